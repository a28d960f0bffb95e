"""Hunyuan-A13B: grouped-query attention with norms of q and k after rotary embedding; every layer
routed by softmax, beside an MLP for all tokens.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import GatedMLP, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    attention_heads,
    check_values,
)
from hmc.models.family import Family
from hmc.models.rope import rope


def build(config: ModelConfig) -> nn.Module:
    """The model of a Hunyuan-A13B config.json, which may say numbers of experts layer by layer."""
    check_values(config, use_qk_norm=True, use_cla=False, norm_topk_prob=True)
    hidden = config.require_int("hidden_size")
    angles = rope(config, attention_heads(config)[2])
    bias = config.get_bool("attention_bias", False)

    def routed(index: int) -> nn.Module:
        experts = _of_layer(config, "num_experts", index)
        top_k = _of_layer(config, "moe_topk", index)
        if top_k > experts:
            raise config.error("moe_topk", f"is {top_k}, more than the {experts} experts")
        width = config.require_int("intermediate_size", minimum=1)
        for key in ("moe_intermediate_size", "num_shared_expert"):
            wanted = 1 if key == "num_shared_expert" else width
            if key in config and _of_layer(config, key, index) != wanted:
                raise config.unsupported(key, f"{wanted}, as in the published models")
        route = Route(experts, top_k, Scoring.SOFTMAX_ALL, normalise=True)
        return MoE(hidden, width, route, GatedMLP(hidden, width))

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(
            config, angles, bias=bias, out_bias=bias, qk_norm="head", norm_last=True
        )
        return DecoderLayer(config, attention, routed(index))

    return CausalLM(config, layer)


def _of_layer(config: ModelConfig, key: str, index: int) -> int:
    """A number that is the same for all layers, or one of a list."""
    found = config.get_ints(key)
    if not found or not (len(found) == 1 or index < len(found)) or min(found) < 1:
        raise config.error(key, "must be a number above 0, or a list of one a layer")
    return found[0] if len(found) == 1 else found[index]


FAMILIES = (
    Family(
        "hunyuan_v1_moe",
        build,
        "norms of q and k after rotary embedding, a shared expert",
        ("tencent/Hunyuan-A13B-Instruct",),
        names=(
            (r"\.mlp\.gate\.", ".mlp.gate.wg."),
            (r"\.mlp\.shared_experts\.", ".mlp.shared_mlp."),
            (r"\.q_norm\.", ".query_layernorm."),
            (r"\.k_norm\.", ".key_layernorm."),
        ),
    ),
)
