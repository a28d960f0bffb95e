"""Routed MLPs as several families build them from their configuration, and who has one."""

from __future__ import annotations

from typing import Literal

from torch import nn

from hmc.blocks import GatedMLP, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import MoE
from hmc.models.stacks import stacked

Stacking = Literal["", "rows", "columns"]


def is_routed(config: ModelConfig, index: int, first: int = 0) -> bool:
    """Whether a layer is routed: by `mlp_layer_types`, else from layer `first_k_dense_replace` (or
    `first`) on every `moe_layer_freq`-th.
    """
    kinds = config.get_strs("mlp_layer_types")
    if kinds:
        depth = config.require_int("num_hidden_layers")
        if len(kinds) < depth or {*kinds} - {"dense", "sparse"}:
            raise config.error(
                "mlp_layer_types", f"must say dense or sparse for each of {depth} layers"
            )
        return kinds[index] == "sparse"
    first = config.get_int("first_k_dense_replace", first)
    return index >= first and index % config.get_int("moe_layer_freq", 1, minimum=1) == 0


def dense_mlp(config: ModelConfig) -> GatedMLP:
    """The MLP of a layer that is not routed."""
    hidden = config.require_int("hidden_size")
    return GatedMLP(hidden, config.require_int("intermediate_size", minimum=1))


def routed_experts(
    config: ModelConfig, *keys: str, chosen: str = "num_experts_per_tok"
) -> tuple[int, int]:
    """(routed experts, experts a token), the first from whichever of `keys` the config has, the
    second from `chosen`.
    """
    key = next((key for key in keys if key in config), keys[0])
    experts = config.require_int(key, minimum=1)
    top_k = config.require_int(chosen, minimum=1)
    if top_k > experts:
        raise config.error(chosen, f"is {top_k}, more than the {experts} experts")
    return experts, top_k


def softmax_moe(
    config: ModelConfig,
    width: str = "moe_intermediate_size",
    shared: nn.Module | None = None,
    *,
    stacks: Stacking = "",
) -> MoE:
    """Softmax over all experts, the chosen renormalised where the config says so; experts are as
    wide as key `width` says, one by one or in `stacks` by rows or columns, and `shared` is weighed.
    """
    experts, top_k = routed_experts(config, "num_experts", "num_local_experts")
    normalise = config.get_bool("norm_topk_prob", False)
    hidden, inner = config.require_int("hidden_size"), config.require_int(width, minimum=1)
    return MoE(
        hidden,
        inner,
        Route(experts, top_k, Scoring.SOFTMAX_ALL, normalise=normalise),
        shared,
        weighed=shared is not None,
        stacked=stacked(experts, hidden, inner, transposed=stacks == "columns") if stacks else None,
    )


def grouped_moe(
    config: ModelConfig,
    *,
    normalise: bool = True,
    factor: float | None = None,
    act: str = "",
    stacks: bool = False,
) -> MoE:
    """DeepSeek-V3's: sigmoid scores, a correction bias for the choice, groups, shared experts;
    weights are renormalised where the configuration says so, or else `normalise`, and multiplied
    by `routed_scaling_factor`, or else `factor`. `act` is the routed experts' activation where it
    is not the configuration's; they are one by one or in `stacks` by rows.
    """
    experts, top_k = routed_experts(config, "n_routed_experts", "num_experts", "num_local_experts")
    groups, top_groups = expert_groups(config, experts, top_k)
    scale = "routed_scaling_factor"
    route = Route(
        experts,
        top_k,
        Scoring.SIGMOID,
        normalise=config.get_bool("norm_topk_prob", normalise),
        groups=groups,
        top_groups=top_groups,
        factor=config.require_float(scale) if factor is None else config.get_float(scale, factor),
        bias_name="gate.e_score_correction_bias",
    )
    hidden, inner = (
        config.require_int(key, minimum=1) for key in ("hidden_size", "moe_intermediate_size")
    )
    return MoE(
        hidden,
        inner,
        route,
        shared_experts(config, "n_shared_experts", "num_shared_experts"),
        act=act,
        stacked=stacked(experts, hidden, inner) if stacks else None,
    )


def biased_moe(
    config: ModelConfig, width: int, *, factor: float = 1.0, shared: nn.Module | None = None
) -> MoE:
    """Sigmoid scores, a correction bias for the choice, weights renormalised and scaled; experts
    `width` wide. The bias lies beside the gate.
    """
    experts, top_k = routed_experts(config, "num_experts", "num_local_experts")
    bias = "e_score_correction_bias"
    route = Route(experts, top_k, Scoring.SIGMOID, normalise=True, factor=factor, bias_name=bias)
    return MoE(config.require_int("hidden_size"), width, route, shared)


def shared_experts(config: ModelConfig, *keys: str) -> GatedMLP | None:
    """So many experts as the first of `keys` in the config says, which every token goes through, as
    one MLP.
    """
    count = next((config.get_int(key, 0) for key in keys if key in config), 0)
    width = config.require_int("moe_intermediate_size", minimum=1) * count
    return GatedMLP(config.require_int("hidden_size"), width) if count else None


def expert_groups(config: ModelConfig, experts: int, top_k: int) -> tuple[int, int]:
    """(groups, groups a token may use), both 0 where every group is open anyway."""
    groups = config.get_int("n_group", 1, minimum=1)
    top_groups = config.get_int("topk_group", 1, minimum=1)
    if experts % groups or experts // groups < 2:
        raise config.error("n_group", f"is {groups}: {experts} experts make no such groups of 2+")
    if top_groups > groups:
        raise config.error("topk_group", f"is {top_groups}, more than the {groups} groups")
    if top_groups * (experts // groups) < top_k:
        raise config.error("topk_group", f"is {top_groups}: too few experts to choose {top_k}")
    return (0, 0) if top_groups == groups else (groups, top_groups)
