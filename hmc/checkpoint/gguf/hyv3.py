"""Hunyuan 3 as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    LAYER,
    QK_NORMS,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
    mlp_types,
    shared_expert,
    sigmoid_alone,
)


def _config(facts: Facts) -> Values:
    sigmoid_alone(facts)
    width = facts.whole("expert_feed_forward_length")
    shared = facts.whole("expert_shared_feed_forward_length", width)
    return {
        "model_type": "hy_v3",
        "architectures": ["HYV3ForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "moe_intermediate_size": width,
        "num_shared_experts": shared // (width or 1),
        "router_scaling_factor": facts.number("expert_weights_scale", 1.0),
        "mlp_layer_types": mlp_types(facts),
    }


HY_V3 = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **experts(),
        **shared_expert("mlp.shared_mlp"),
        "blk.{n}.ffn_gate_inp": LAYER + "mlp.router.gate",
        "blk.{n}.exp_probs_b": LAYER + "mlp.expert_bias",
        "blk.{n}.exp_probs_b.bias": LAYER + "mlp.expert_bias",
    },
)
