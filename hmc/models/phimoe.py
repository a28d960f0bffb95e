"""Phi-3.5-MoE: Mixtral's layers with LayerNorms, biases, and experts chosen and weighed one after
the other by SparseMixer.
"""

from __future__ import annotations

from typing import Literal

from torch import nn

from hmc.blocks import Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    attention_heads,
    check_values,
    check_window,
    norm_eps,
)
from hmc.models.family import W123, Family, Limit
from hmc.models.norms import LayerNorm
from hmc.models.rope import rope, short_context
from hmc.models.routing import routed_experts


def build(config: ModelConfig) -> nn.Module:
    """The model of a Phi-3.5-MoE config.json, of contexts as long as before they were stretched."""
    return _model(config, "short")


def build_long(config: ModelConfig) -> nn.Module:
    """The same of longer contexts, which turns every position by other frequencies."""
    return _model(config, "long")


def _model(config: ModelConfig, factors: Literal["short", "long"]) -> nn.Module:
    check_window(config)
    hidden = config.require_int("hidden_size")
    angles = rope(config, attention_heads(config)[2], 1e6, longrope=factors)
    bias = config.get_bool("attention_bias", False)
    experts, top_k = routed_experts(config, "num_local_experts", "num_experts")
    check_values(config, num_experts_per_tok=2)
    jitter = config.get_float("router_jitter_noise", 0.01)

    def norm(config: ModelConfig) -> nn.Module:
        return LayerNorm(hidden, norm_eps(config), bias=True)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(config, angles, bias=bias, out_bias=bias)
        route = Route(experts, top_k, Scoring.SPARSEMIXER, normalise=False, jitter=jitter)
        mlp = MoE(hidden, config.require_int("intermediate_size", minimum=1), route)
        return DecoderLayer(config, attention, mlp, norm=norm)

    return CausalLM(config, layer, norm=norm, bias=config.get_bool("lm_head_bias", False))


def limit(config: ModelConfig) -> Limit | None:
    """Frequencies follow from the context that a plan has, not from the length of each sequence:
    cached keys, which sequences share, were turned by them. So a sequence within the old context is
    exact in a plan of no more, and a longer one in a plan for longer ones. (The Phimoe module of
    transformers 5.24 tells its LongRoPE no length, and so has short factors beyond, too.)
    """
    if not (tokens := short_context(config)):
        return None
    return Limit(
        tokens,
        "original_max_position_embeddings: beyond it longrope takes its long factors;"
        " --max-context asks for that",
        build_long,
        "longrope turns every position by its long factors, also where a sequence is shorter",
    )


FAMILIES = (
    Family(
        "phimoe",
        build,
        "SparseMixer routing, LayerNorm, biases of attention and logits, longrope (long factors"
        " where --max-context asks for more than original_max_position_embeddings)",
        ("microsoft/Phi-3.5-MoE-instruct",),
        names=((r"\.mlp\.", ".block_sparse_moe."), *W123),
        limit=limit,
    ),
)
