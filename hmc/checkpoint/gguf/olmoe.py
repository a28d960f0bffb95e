"""OLMoE as GGUF files name it."""

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
    values = {
        "model_type": "olmoe",
        "architectures": ["OlmoeForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "intermediate_size": facts.whole("feed_forward_length"),
        "norm_topk_prob": facts.flag("expert_weights_norm", False),
    }
    if facts.has("attention.clamp_kqv"):
        values["clip_qkv"] = facts.number("attention.clamp_kqv")
    return values


OLMOE = GgufFamily(_config, {**COMMON, **QK_NORMS, **experts()})
