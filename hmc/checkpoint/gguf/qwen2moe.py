"""Qwen2-MoE as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
    shared_expert,
)


def _config(facts: Facts) -> Values:
    common = common_config(facts)
    return {
        "model_type": "qwen2_moe",
        "architectures": ["Qwen2MoeForCausalLM"],
        **common,
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "qkv_bias": common["attention_bias"],
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": facts.whole("expert_shared_feed_forward_length"),
        "mlp_only_layers": facts.layers_without("ffn_gate_inp.weight"),
        "norm_topk_prob": facts.flag("expert_weights_norm", False),
    }


QWEN2_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **experts(),
        **shared_expert("mlp.shared_expert"),
        "blk.{n}.ffn_gate_inp_shexp": LAYER + "mlp.shared_expert_gate",
    },
)
