"""Granite MoE: grouped-query attention, every layer routed by softmax over the chosen experts, all
of a layer stacked; embeddings, scores of attention, what halves of a layer add, and logits are
scaled. GraniteMoeShared: the same, with an MLP for all tokens beside the experts.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hmc.blocks import GatedMLP, Linear, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.views import View
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    attention_heads,
)
from hmc.models.family import Family
from hmc.models.rope import Rope, rope
from hmc.models.routing import routed_experts
from hmc.models.stacks import lie_apart, stacked


def build(config: ModelConfig) -> nn.Module:
    """The model of a Granite MoE config.json."""
    return _model(config, 0)


def build_shared(config: ModelConfig) -> nn.Module:
    """The model of a GraniteMoeShared config.json; a shared MLP 0 wide is none."""
    return _model(config, config.get_int("shared_intermediate_size", 0))


def _model(config: ModelConfig, shared: int) -> nn.Module:
    """`shared` is the width of the MLP for all tokens."""
    angles = rope(config, attention_heads(config)[2])
    return scaled_model(
        config, lambda index: ScaledLayer(config, attention(config, angles), routed(config, shared))
    )


def scaled_model(config: ModelConfig, layer: Callable[[int], nn.Module]) -> nn.Module:
    """Layers between scaled embeddings and scaled logits."""
    return CausalLM(
        config,
        layer,
        embed_scale=config.get_float("embedding_multiplier", 1.0),
        logit_scale=1.0 / _scale(config, "logits_scaling"),
    )


def attention(config: ModelConfig, angles: Rope | None) -> nn.Module:
    """Attention whose scores are scaled; without `angles` it knows no positions."""
    bias = config.get_bool("attention_bias", False)
    scale = _scale(config, "attention_multiplier")
    return GroupedQueryAttention(config, angles, bias=bias, out_bias=bias, scale=scale)


def _scale(config: ModelConfig, key: str) -> float:
    found = config.get_float(key, 1.0)
    if found <= 0:
        raise config.error(key, f"is {found:g}, must be above 0")
    return found


class ScaledLayer(DecoderLayer):
    """What each half adds is multiplied by `residual_multiplier`."""

    def __init__(self, config: ModelConfig, attention: nn.Module, mlp: nn.Module) -> None:
        super().__init__(config, attention, mlp)
        self.share = config.get_float("residual_multiplier", 1.0)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self._norm(self.norms.attention_in, h)
        h = h + self.self_attn(x, positions) * self.share
        return h + self.mlp(self._norm(self.norms.mlp_in, h)) * self.share  # type: ignore[no-any-return]


class SharedMLP(GatedMLP):
    """One tensor `input_linear` has the rows of gate, then those of up."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__(hidden, width)
        self.gate_proj, self.up_proj = (
            Linear(hidden, width, within=("input_linear.weight", View((2 * width, hidden), first)))
            for first in (0, width)
        )


def routed(config: ModelConfig, shared: int) -> MoE:
    """The routed MLP of a layer, and the one of width `shared` for all tokens beside it, if any."""
    experts, top_k = routed_experts(config, "num_local_experts")
    hidden = config.require_int("hidden_size")
    width = config.require_int("intermediate_size", minimum=1)
    apart = lie_apart(config)
    shared_mlp = GatedMLP if apart else SharedMLP
    return MoE(
        hidden,
        width,
        Route(experts, top_k, Scoring.SOFTMAX_CHOSEN, normalise=False),
        shared_mlp(hidden, shared) if shared else None,
        stacked=None if apart else stacked(experts, hidden, width),
    )


NAMES = (
    (r"\.mlp\.shared_experts\.down_proj\.", ".shared_mlp.output_linear."),
    (r"\.mlp\.shared_experts\.", ".shared_mlp."),
    (r"\.mlp\.gate\.", ".block_sparse_moe.router.layer."),
    (r"\.mlp\.experts\.gate_up_proj$", ".block_sparse_moe.input_linear.weight"),
    (r"\.mlp\.experts\.down_proj$", ".block_sparse_moe.output_linear.weight"),
)
SCALES = "stacked experts, scales of embeddings, attention, residuals and logits"

FAMILIES = (
    Family(
        "granitemoe",
        build,
        SCALES,
        ("ibm-granite/granite-3.1-1b-a400m-instruct", "ibm-granite/granite-3.1-3b-a800m-instruct"),
        names=NAMES,
    ),
    Family(
        "granitemoeshared",
        build_shared,
        f"{SCALES}, a shared expert",
        ("ibm-research/moe-7b-1b-active-shared-experts",),
        names=NAMES,
    ),
)
