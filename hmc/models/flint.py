"""Flint: grouped-query attention with norms of q and k by head and sinks; most layers slide, the
others see all tokens and know no positions; sigmoid routing without a bias beside a shared expert.
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
)
from hmc.models.family import Family
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp, routed_experts
from hmc.models.windows import FULL, SLIDING, layer_types, window


def build(config: ModelConfig) -> nn.Module:
    """The model of a Flint config.json."""
    hidden = config.require_int("hidden_size")
    bias = config.get_bool("attention_bias", False)
    kinds = layer_types(config) if "layer_types" in config else _default_types(config)
    angles = rope(config, attention_heads(config)[2])
    dense = config.get_ints("mlp_only_layers") if "mlp_only_layers" in config else (0, 1)
    step = config.get_int("decoder_sparse_step", 1, minimum=1)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(
            config,
            angles if kinds[index] == SLIDING else None,
            bias=bias,
            out_bias=bias,
            qk_norm="head",
            window=window(config, kinds[index]),
            sinks="softmax_offset",
        )
        mlp: nn.Module = dense_mlp(config)
        if index not in dense and (index + 1) % step == 0:
            experts, top_k = routed_experts(config, "num_experts", "num_local_experts")
            normalise = config.get_bool("norm_topk_prob", True)
            mlp = MoE(
                hidden,
                config.require_int("moe_intermediate_size", minimum=1),
                Route(experts, top_k, Scoring.SIGMOID, normalise=normalise),
                GatedMLP(hidden, config.require_int("shared_expert_intermediate_size", minimum=1)),
            )
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


def _default_types(config: ModelConfig) -> tuple[str, ...]:
    """The first two layers, every fourth and the last see all tokens."""
    depth = config.require_int("num_hidden_layers")
    full = {0, depth - 1, *range(1, depth, 4)}
    return tuple(FULL if index in full else SLIDING for index in range(depth))


FAMILIES = (
    Family(
        "flint",
        build,
        "norms of q and k by head, sinks, sliding windows, layers without rope, sigmoid routing",
        ("RecursiveSI/flint",),
        names=((r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),),
    ),
)
