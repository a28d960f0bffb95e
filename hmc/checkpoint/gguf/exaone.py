"""K-EXAONE as GGUF files name it."""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    GROUPED,
    LAYER,
    QK_NORMS,
    Facts,
    GgufFamily,
    Values,
    common_config,
    gating,
    grouped_config,
    head_dim,
    layer_types,
)


def _config(facts: Facts) -> Values:
    return {
        "model_type": "exaone_moe",
        "architectures": ["ExaoneMoEForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **grouped_config(facts, gating(facts, default=2)),
        "sliding_window": facts.whole("attention.sliding_window"),
        "layer_types": layer_types(facts.slides()),
    }


EXAONE_MOE = GgufFamily(
    _config,
    {
        **COMMON,
        **QK_NORMS,
        **GROUPED,
        "blk.{n}.exp_probs_b.bias": LAYER + "mlp.e_score_correction_bias",
    },
)
