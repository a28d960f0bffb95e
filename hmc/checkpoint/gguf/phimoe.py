"""Phi-3.5-MoE as GGUF files name it. Factors of its frequencies are tensors in them; what cos and
sin are multiplied by is the published number, and not the one that the converter made up.
"""

from __future__ import annotations

from hmc.checkpoint.gguf.families import (
    COMMON,
    Facts,
    GgufFamily,
    Values,
    common_config,
    experts,
    experts_config,
    head_dim,
)

_FACTORS = {"short": "rope_factors_short.weight", "long": "rope_factors_long.weight"}
_MSCALE = 1.243163121016122
"""`short_mscale` and `long_mscale` of Phi-3.5-MoE, the one model that has such factors."""


def _config(facts: Facts) -> Values:
    values = {
        "model_type": "phimoe",
        "architectures": ["PhiMoEForCausalLM"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_local_experts"),
        "intermediate_size": facts.whole("feed_forward_length"),
        "lm_head_bias": "output.bias" in facts.tensors,
    }
    if facts.tensors.keys() & {*_FACTORS.values()}:
        original = facts.whole("rope.scaling.original_context_length")
        values["original_max_position_embeddings"] = original
        values["rope_scaling"] = {
            "type": "longrope",
            "original_max_position_embeddings": original,
            **{f"{which}_factor": facts.floats(name) for which, name in _FACTORS.items()},
            **{f"{which}_mscale": _MSCALE for which in _FACTORS},
        }
    return values


PHIMOE = GgufFamily(
    _config,
    {**COMMON, **experts("block_sparse_moe.", "w1", "w3", "w2")},
    settings=tuple(_FACTORS.values()),
)
