"""Step-3.5 and 3.7: grouped-query attention with norms of q and k by head and a gate on each head's
result; layers differ in query heads, windows, rotary embedding and bounds of activations;
sigmoid routing with a bias, beside a shared expert.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from hmc.blocks import GatedMLP, Linear, RMSNorm, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import gated
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    SizedNorm,
    check_values,
    norm_eps,
)
from hmc.models.family import NO_IMAGES, Aside, Family, look_ahead
from hmc.models.norms import CentredNorm
from hmc.models.rope import Rope, rope
from hmc.models.routing import routed_experts
from hmc.models.stacks import apart
from hmc.models.windows import FULL, SLIDING, layer_types, window

Heads = tuple[int, int, int]


class GatedAttention(GroupedQueryAttention):
    """What each head mixed is multiplied by the sigmoid of a gate."""

    def __init__(self, config: ModelConfig, angles: Rope, heads: Heads, window: int) -> None:
        super().__init__(
            config, angles, heads=heads, qk_norm="head", norm=_sized(config), window=window
        )
        self.heads, _, self.head_dim = heads
        self.g_proj = Linear(config.require_int("hidden_size"), self.heads)

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        gate = torch.sigmoid(self.g_proj(x)).unsqueeze(-1)
        return (mixed.reshape(-1, self.heads, self.head_dim) * gate).flatten(-2)


def build(config: ModelConfig) -> nn.Module:
    """The model of a Step-3.5 config.json, or of the text part of a Step-3.7 one."""
    check_values(
        config,
        att_impl_type="GQA",
        moe_router_activation="sigmoid",
        norm_expert_weight=True,
        sink=False,
        use_head_wise_attn_gate=True,
        use_moe_router_bias=True,
        use_qk_norm=True,
    )
    kinds = layer_types(config)
    other = config.section("attention_other_setting") or config
    heads = {FULL: _heads(config, config), SLIDING: _heads(config, other)}
    thetas = _by_layer(config, "rope_theta", 10_000.0)
    shares = _by_layer(config, "partial_rotary_factors", 1.0)
    routed_bounds = _by_layer(config, "swiglu_limits", 0.0)
    other_bounds = _by_layer(config, "swiglu_limits_shared", 0.0)
    routed = _routed(config)

    def layer(index: int) -> nn.Module:
        kind = kinds[index]
        angles = _rope(config, kind, heads[kind][2], thetas[index], shares[index])
        attention = GatedAttention(config, angles, heads[kind], window(config, kind))
        if index in routed:
            mlp: nn.Module = _moe(config, routed_bounds[index], other_bounds[index])
        else:
            mlp = _mlp(config, "intermediate_size", other_bounds[index])
        return DecoderLayer(config, attention, mlp, norm=_norm)

    return CausalLM(config, layer, norm=_norm)


def _norm(config: ModelConfig) -> nn.Module:
    return _sized(config)(config.require_int("hidden_size"), norm_eps(config), 1)


def _sized(config: ModelConfig) -> SizedNorm:
    """Norms times 1 + weight; where `zero_centered` is false, times the weight alone."""
    return CentredNorm if config.get_bool("zero_centered", True) else RMSNorm


def _mlp(config: ModelConfig, width: str, bound: float) -> GatedMLP:
    hidden = config.require_int("hidden_size")
    return GatedMLP(hidden, config.require_int(width, minimum=1), act=_act(bound))


def _act(bound: float) -> str:
    return gated("silu(gate)", limit=bound, after=True)


def _moe(config: ModelConfig, bound: float, shared_bound: float) -> MoE:
    experts, top_k = routed_experts(config, "moe_num_experts", chosen="moe_top_k")
    hidden = config.require_int("hidden_size")
    width = config.require_int("moe_intermediate_size", minimum=1)
    factor = config.get_float("moe_router_scaling_factor", 1.0)
    route = Route(
        experts, top_k, Scoring.SIGMOID, normalise=True, factor=factor, bias_name="router_bias"
    )
    names = (f"{name}_proj.weight" for name in ("gate", "up", "down"))
    return MoE(
        hidden,
        width,
        route,
        _mlp(config, "share_expert_dim", shared_bound),
        act=_act(bound),
        stacked=apart(experts, hidden, width, *names),
    )


def _routed(config: ModelConfig) -> frozenset[int]:
    """Layers with experts: numbers in a text or a list; without, all but the first three."""
    key, depth = "moe_layers_enum", config.require_int("num_hidden_layers")
    if key not in config:
        return frozenset(range(3, depth))
    found = config.values[key]
    items = found.split(",") if isinstance(found, str) else map(str, config.get_ints(key))
    numbers = [item.strip() for item in items if item.strip()]
    if not all(number.isdecimal() for number in numbers):
        raise config.error(key, "must be numbers of layers with commas between them")
    return frozenset(map(int, numbers))


def _heads(config: ModelConfig, own: ModelConfig) -> Heads:
    """(query heads, key heads, elements a head) as `own` says, or else the configuration."""
    count, kv_count, dim = (
        own.get_int(name, config.require_int(name, minimum=1), minimum=1)
        for name in ("num_attention_heads", "num_attention_groups", "head_dim")
    )
    if count % kv_count:
        raise own.error("num_attention_groups", f"is {kv_count}, of {count} heads")
    return count, kv_count, dim


def _by_layer(config: ModelConfig, key: str, default: float) -> tuple[float, ...]:
    """A number for each layer, or one for all; null is 0."""
    depth, found = config.require_int("num_hidden_layers"), config.values.get(key)
    if not isinstance(found, list):
        return (config.get_float(key, default),) * depth
    if len(found) < depth or not all(type(each or 0) in (int, float) for each in found):
        raise config.error(key, f"must be a number for each of {depth} layers")
    return tuple(float(each or 0) for each in found[:depth])


def _rope(config: ModelConfig, kind: str, dim: int, theta: float, share: float) -> Rope:
    """Frequencies are scaled in layers of `yarn_only_types` alone."""
    own: dict[str, Any] = {"rope_theta": theta, "partial_rotary_factor": share}
    scaled = config.get_strs("yarn_only_types") or (FULL,)
    if kind not in scaled:
        own |= dict.fromkeys(("rope_scaling", "rope_parameters"))
    return rope(config.with_text(**own), dim, partial=1.0)


def _aside(config: ModelConfig) -> tuple[Aside, ...]:
    images = (Aside(f"{name}.*", NO_IMAGES) for name in ("vision_model", "vit_large_projector"))
    return *look_ahead(config), *images


_NEEDS = (
    "heads, sliding windows, rope and bounds of activations by layer, part of each head rotated,"
    " gated heads, norms with 1 + weight, stacked experts, sigmoid routing with a bias"
)
_NAMES = (
    (r"\.mlp\.(gate\.|router_bias$)", r".moe.\1"),
    (r"\.mlp\.experts\.", ".moe."),
    (r"\.mlp\.shared_experts\.", ".share_expert."),
)

FAMILIES = (
    Family("step3p5", build, _NEEDS, ("stepfun-ai/Step-3.5-Flash",), names=_NAMES, aside=_aside),
    Family(
        "step3p7",
        build,
        f"{_NEEDS}; text alone",
        ("stepfun-ai/Step-3.7-Flash",),
        names=_NAMES,
        aside=_aside,
    ),
)
