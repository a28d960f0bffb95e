"""Mixtral: grouped-query attention; every layer routed, softmax over the chosen experts."""

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
    check_window,
)
from hmc.models.family import W123, Family
from hmc.models.rope import rope
from hmc.models.routing import routed_experts


def build(config: ModelConfig) -> nn.Module:
    """The model of a Mixtral config.json."""
    check_window(config)
    angles = rope(config, attention_heads(config)[2], default_theta=1e6)

    def layer(index: int) -> nn.Module:
        return DecoderLayer(config, GroupedQueryAttention(config, angles), _routed(config))

    return CausalLM(config, layer)


def _routed(config: ModelConfig) -> MoE:
    """Softmax over all experts, renormalised over the chosen, is softmax over the chosen."""
    experts, top_k = routed_experts(config, "num_local_experts", "num_experts")
    return MoE(
        config.require_int("hidden_size"),
        config.require_int("intermediate_size", minimum=1),
        Route(experts, top_k, Scoring.SOFTMAX_CHOSEN, normalise=False),
    )


FAMILIES = (
    Family(
        "mixtral",
        build,
        published=("mistralai/Mixtral-8x7B-Instruct-v0.1", "mistralai/Mixtral-8x22B-Instruct-v0.1"),
        names=((r"\.mlp\.", ".block_sparse_moe."), *W123),
    ),
)
