"""Laguna as GGUF files name it. Those without a pattern of layers have a full one first of four,
or, without a window, full ones alone.
"""

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
    layer_types,
    shared_expert,
    sigmoid_alone,
)
from hmc.checkpoint.gguf.rope import by_layer_type

_PERIOD = 4


def _config(facts: Facts) -> Values:
    sigmoid_alone(facts)
    heads, size = facts.by_layer("attention.head_count"), facts.whole("attention.key_length")
    window = facts.whole("attention.sliding_window", 0)
    gates = facts.tensors.get("blk.0.attn_gate.weight", ())[:1]
    return {
        "model_type": "laguna",
        "architectures": ["LagunaForCausalLM"],
        **common_config(facts, heads=heads[0]),
        **by_layer_type(facts, size),
        **experts_config(facts, "num_experts"),
        "head_dim": size,
        "num_attention_heads_per_layer": heads,
        "gating": "per-element" if gates == (heads[0] * size,) else "per-head",
        "sliding_window": window,
        "layer_types": layer_types(
            facts.slides([int(window > 0 and index % _PERIOD > 0) for index in range(facts.layers)])
        ),
        "first_k_dense_replace": facts.whole("leading_dense_block_count", 0),
        "intermediate_size": facts.whole("feed_forward_length"),
        "moe_intermediate_size": facts.whole("expert_feed_forward_length"),
        "shared_expert_intermediate_size": facts.whole("expert_shared_feed_forward_length"),
        "moe_routed_scaling_factor": facts.number("expert_weights_scale", 1.0),
    }


LAGUNA = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **experts(),
        **shared_expert("mlp.shared_expert"),
        "blk.{n}.attn_gate": LAYER + "self_attn.g_proj",
        "blk.{n}.exp_probs_b.bias": LAYER + "mlp.experts.e_score_correction_bias",
    },
)
