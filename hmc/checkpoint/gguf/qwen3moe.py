"""Qwen3-MoE as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    QK_NORMS,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "qwen3_moe",
        "architectures": ["Qwen3MoeForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "mlp_only_layers": facts.layers_without("ffn_gate_inp.weight"),
        "norm_topk_prob": facts.flag("expert_weights_norm", True),
    }


QWEN3_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **experts(),
    },
)
