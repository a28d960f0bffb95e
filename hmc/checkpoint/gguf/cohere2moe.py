"""North and Command A+ (Cohere2-MoE) as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    gating,
    head_dim,
    layer_types,
    shared_expert,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "cohere2_moe",
        "architectures": ["Cohere2MoeForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_experts"),
        "intermediate_size": facts.whole("expert_feed_forward_length"),
        "prefix_dense_intermediate_size": facts.whole("feed_forward_length"),
        "first_k_dense_replace": facts.whole("leading_dense_block_count", 0),
        "num_shared_experts": facts.whole("expert_shared_count", 0),
        "expert_selection_fn": gating(facts, default=2),
        "norm_topk_prob": facts.flag("expert_weights_norm", False),
        "sliding_window": facts.whole("attention.sliding_window"),
        "layer_types": layer_types(facts.slides()),
        "logit_scale": facts.number("logit_scale"),
    }


COHERE2_MOE = GgufFamily(_config, {**COMMON, **experts(), **shared_expert("mlp.shared_experts")})
