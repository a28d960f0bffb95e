"""MiMo-V2-Flash as GGUF files name it. Those of before 2026 do not say that values are scaled."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    GROUPED,
    LAYER,
    Facts,
    GgufFamily,
    Values,
    common_config,
    gating,
    grouped_config,
    rotated_share,
)


def _config(facts: Facts) -> Values:
    slides = facts.slides()
    kinds = dict(zip(slides, facts.by_layer("attention.head_count_kv"), strict=True))
    dense = facts.layers_without("ffn_gate_inp.weight")
    size = facts.whole("attention.key_length")
    return {
        "model_type": "mimo_v2_flash",
        "architectures": ["MiMoV2FlashForCausalLM"],
        **common_config(facts, kinds.get(0, 1)),
        "swa_num_key_value_heads": kinds.get(1, 1),
        "swa_rope_theta": facts.number("rope.freq_base_swa"),
        "head_dim": size,
        "v_head_dim": facts.whole("attention.value_length"),
        "partial_rotary_factor": rotated_share(facts, size),
        "attention_value_scale": facts.number("attention.value_scale", 0.707),
        "hybrid_layer_pattern": slides,
        "sliding_window_size": facts.whole("attention.sliding_window"),
        **grouped_config(facts, gating(facts, default=2)),
        "norm_topk_prob": facts.flag("expert_weights_norm", True),
        "moe_layer_freq": [int(index not in dense) for index in range(facts.layers)],
    }


MIMO2 = GgufFamily(
    _config,
    {
        **COMMON,
        **GROUPED,
        "blk.{n}.attn_sinks.weight": LAYER + "self_attn.attention_sink_bias",
    },
)
