"""Phi-3.5-MoE: Mixtral's layers with LayerNorms, biases, and experts chosen and weighed one after
the other by SparseMixer.
"""

from __future__ import annotations

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
    """The model of a Phi-3.5-MoE config.json."""
    check_window(config)
    hidden = config.require_int("hidden_size")
    angles = rope(config, attention_heads(config)[2], 1e6, short=True)
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
    """Beyond the context before it was stretched, every position turns by other frequencies."""
    tokens = short_context(config)
    reason = "beyond it longrope takes its long factors, which hmc does not"
    return Limit(tokens, f"original_max_position_embeddings: {reason}") if tokens else None


FAMILIES = (
    Family(
        "phimoe",
        build,
        "SparseMixer routing, LayerNorm, biases of attention and logits, longrope",
        ("microsoft/Phi-3.5-MoE-instruct",),
        names=((r"\.mlp\.", ".block_sparse_moe."), *W123),
        limit=limit,
    ),
)
