"""Mixtral: grouped-query attention; every layer routed, softmax over the chosen experts."""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import Experts, Linear, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_window,
    no_extra_tensors,
    routed_experts,
)
from hmc.models.rope import rope

tolerated = no_extra_tensors


def build(config: ModelConfig) -> nn.Module:
    """The model of a Mixtral config.json."""
    check_window(config)
    angles = rope(config, attention_heads(config)[2], default_theta=1e6)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(config, angles)
        return DecoderLayer(config, attention, SparseMoe(config), "block_sparse_moe")

    return CausalLM(config, layer)


class SparseMoe(nn.Module):
    """The routed MLP of a layer; softmax over all experts, renormalised over the chosen, is softmax
    over the chosen.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        intermediate = config.require_int("intermediate_size", minimum=1)
        experts, top_k = routed_experts(config, "num_local_experts", "num_experts")
        self.gate = Linear(hidden, experts)
        self.route = Route(experts, top_k, Scoring.SOFTMAX_CHOSEN, normalise=False)
        self.experts = Experts(experts, hidden, intermediate, top_k, ("w1", "w3", "w2"))

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.route(self.gate(x)))  # type: ignore[no-any-return]
