"""Llama 4 (Scout, Maverick): most layers turn queries and keys and see their own chunk of the
context; the others know no positions, see all tokens, and have queries that grow with theirs.
Routed layers among dense ones: the sigmoid of the chosen experts' logits weighs what experts read,
beside a shared one.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import GatedMLP, Growth, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import activation, weighed
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    attention_heads,
    norm_eps,
)
from hmc.models.family import NO_IMAGES, Aside, Family
from hmc.models.norms import unit
from hmc.models.rope import rope
from hmc.models.routing import routed_experts
from hmc.models.stacks import stacked
from hmc.models.windows import FULL

CHUNKED = "chunked_attention"
CHUNK = 8192
"""Tokens of a chunk, and positions after which queries grow, where the configuration is silent."""


def build(config: ModelConfig) -> nn.Module:
    """The model of the text part of a Llama 4 config.json."""
    hidden = config.require_int("hidden_size")
    turned, routed = _turned(config), _routed(config)
    kinds = _kinds(config, turned)

    def layer(index: int) -> nn.Module:
        if index in routed:
            mlp: nn.Module = _experts(config)
        else:
            mlp = GatedMLP(hidden, config.require_int("intermediate_size_mlp", minimum=1))
        attention = UnitHeads(config, turned[index], kinds[index] == CHUNKED)
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


class UnitHeads(GroupedQueryAttention):
    """Where heads are `turned`, they have unit length after it if `use_qk_norm` says so; otherwise
    queries grow.
    """

    def __init__(self, config: ModelConfig, turned: bool, chunked: bool) -> None:
        bias = config.get_bool("attention_bias", False)
        super().__init__(
            config,
            rope(config, attention_heads(config)[2], 500_000.0) if turned else None,
            bias=bias,
            out_bias=bias,
            norm_last=True,
            interleaved=True,
            chunk=_chunk(config) if chunked else 0,
            growth=None if turned else _growth(config),
        )
        self.unit = turned and config.get_bool("use_qk_norm", True)
        self.counts, self.eps = attention_heads(config)[:2], norm_eps(config)

    def _normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        if not self.unit:
            return q, k
        q, k = (
            unit(each.unflatten(-1, (count, -1)), self.eps).flatten(-2)  # type: ignore[no-untyped-call]
            for each, count in zip((q, k), self.counts, strict=True)
        )
        return q, k


def _growth(config: ModelConfig) -> Growth | None:
    """`attn_temperature_tuning` was a number at first, of which only 0 is no."""
    key = "attn_temperature_tuning"
    tuned = config.get_int(key, 1) if type(config.values.get(key)) is int else None
    if not (config.get_bool(key, True) if tuned is None else tuned):
        return None
    every = config.get_int("floor_scale", CHUNK, minimum=1)
    return Growth(config.get_float("attn_scale", 0.1), every, start=1)


def _chunk(config: ModelConfig) -> int:
    return config.get_int("attention_chunk_size", CHUNK, minimum=1)


def _turned(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer has rotary embedding: 1 in `no_rope_layers` where that says anything."""
    depth = config.require_int("num_hidden_layers")
    found = config.get_ints("no_rope_layers")
    if not found:
        every = config.get_int("no_rope_layer_interval", 4, minimum=1)
        return tuple((index + 1) % every != 0 for index in range(depth))
    if len(found) < depth or {*found} - {0, 1}:
        raise config.error("no_rope_layers", f"must say 0 or 1 for each of {depth} layers")
    return tuple(each == 1 for each in found)


def _kinds(config: ModelConfig, turned: tuple[bool, ...]) -> tuple[str, ...]:
    """The type of each layer; a chunk size that is null means that there are no chunks."""
    found = config.get_strs("layer_types")
    if found:
        if len(found) < len(turned) or {*found} - {FULL, CHUNKED}:
            wanted = f"must say {FULL} or {CHUNKED} for each of {len(turned)} layers"
            raise config.error("layer_types", wanted)
        return found
    chunks = config.values.get("attention_chunk_size", CHUNK) is not None
    return tuple(CHUNKED if each and chunks else FULL for each in turned)


def _routed(config: ModelConfig) -> frozenset[int]:
    """Which layers have experts: those of `moe_layers`, else every so many."""
    if "moe_layers" in config:
        return frozenset(config.get_ints("moe_layers"))
    step = config.get_int("interleave_moe_layer_step", 1, minimum=1)
    return frozenset(range(step - 1, config.require_int("num_hidden_layers"), step))


def _experts(config: ModelConfig) -> MoE:
    experts, top_k = routed_experts(config, "num_local_experts")
    hidden, width = (
        config.require_int(key, minimum=1) for key in ("hidden_size", "intermediate_size")
    )
    return MoE(
        hidden,
        width,
        Route(experts, top_k, Scoring.SIGMOID_CHOSEN, normalise=False),
        GatedMLP(hidden, width),
        act=weighed(activation(config)),
        stacked=stacked(experts, hidden, width, transposed=True),
    )


def _vision(config: ModelConfig) -> tuple[Aside, ...]:
    names = ("vision_model", "multi_modal_projector")
    return tuple(Aside(f"{name}.*", NO_IMAGES) for name in names)


FAMILIES = (
    Family(
        "llama4",
        build,
        "chunks, layers without rope whose queries grow, unit length of q and k, weights on what"
        " experts read, a shared expert; text alone",
        (
            "meta-llama/Llama-4-Scout-17B-16E-Instruct",
            "meta-llama/Llama-4-Maverick-17B-128E-Instruct",
        ),
        names=(
            (r"\.mlp\.gate\.", ".mlp.router."),
            (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
            (r"\.mlp\.", ".feed_forward."),
            (r"^", "language_model."),
        ),
        aside=_vision,
    ),
)
