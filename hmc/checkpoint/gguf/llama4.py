"""Llama 4 as GGUF files name it. They do not say how long chunks are, which layers know positions,
how queries grow, and whether heads have unit length: all is as published, the last in Scout alone.
A window of 0 means that there are neither chunks nor layers without positions.
"""

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
    renamed,
    shared_expert,
)
from hmc.checkpoint.gguf.rope import FACTORS, llama3

_MAVERICK = 128
"""Experts of the model whose heads keep their length."""


def _config(facts: Facts) -> Values:
    values = {
        "model_type": "llama4",
        "architectures": ["Llama4ForConditionalGeneration"],
        **common_config(facts),
        **head_dim(facts),
        **experts_config(facts, "num_local_experts"),
        **llama3(facts, 1.0, 1.0, 8192),
        "intermediate_size": facts.whole("expert_feed_forward_length"),
        "intermediate_size_mlp": facts.whole("feed_forward_length"),
        "interleave_moe_layer_step": facts.whole("interleave_moe_layer_step"),
        "use_qk_norm": facts.whole("expert_count") != _MAVERICK,
    }
    if not facts.whole("attention.sliding_window", 1):
        values |= {"attention_chunk_size": None, "no_rope_layers": [1] * facts.layers}
    return values


_NAMES = {
    **COMMON,
    **experts("feed_forward."),
    **shared_expert("feed_forward.shared_expert"),
    **{
        f"blk.{{n}}.ffn_{role}": f"{LAYER}feed_forward.{role}_proj"
        for role in ("gate", "up", "down")
    },
    "blk.{n}.ffn_gate_inp": LAYER + "feed_forward.router",
}

LLAMA4 = GgufFamily(_config, renamed(_NAMES, "", "language_model."), settings=(FACTORS,))
