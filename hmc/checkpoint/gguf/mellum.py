"""Mellum 2 as GGUF files name it."""

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
    layer_types,
    mlp_types,
)
from hmc.checkpoint.gguf.rope import by_layer_type


def _config(facts: Facts) -> Values:
    head, window = head_dim(facts), facts.whole("attention.sliding_window", 0)
    return {
        "model_type": "mellum",
        "architectures": ["MellumForCausalLM"],
        **common_config(facts),
        **head,
        **by_layer_type(facts, head["head_dim"]),
        **experts_config(facts, "num_experts"),
        "intermediate_size": facts.whole("feed_forward_length", 0),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "norm_topk_prob": facts.flag("expert_weights_norm", True),
        "sliding_window": window,
        "layer_types": layer_types(facts.slides() if window else [0] * facts.layers),
        "mlp_layer_types": mlp_types(facts),
    }


MELLUM = GgufFamily(_config, {**COMMON, **QK_NORMS, **experts()})
