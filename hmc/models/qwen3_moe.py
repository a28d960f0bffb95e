"""Qwen3-MoE: grouped-query attention with per-head norms of q and k; routed layers among optional
dense ones.
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
    check_window,
    routed_experts,
)
from hmc.models.rope import rope


def build(config: ModelConfig) -> nn.Module:
    """The model of a Qwen3-MoE config.json."""
    if config.get_bool("use_sliding_window", False):
        check_window(config)
    hidden = config.require_int("hidden_size")
    angles = rope(config, attention_heads(config)[2])
    dense = config.get_ints("mlp_only_layers")
    step = config.get_int("decoder_sparse_step", 1, minimum=1)

    def layer(index: int) -> nn.Module:
        routed = index not in dense and (index + 1) % step == 0
        attention = GroupedQueryAttention(
            config, angles, bias=config.get_bool("attention_bias", False), qk_norm=True
        )
        mlp = (
            routed_mlp(config)
            if routed
            else GatedMLP(hidden, config.require_int("intermediate_size", minimum=1))
        )
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


def routed_mlp(config: ModelConfig) -> MoE:
    """Softmax over all experts, the chosen renormalised where the config says so."""
    experts, top_k = routed_experts(config, "num_experts", "num_local_experts")
    normalise = config.get_bool("norm_topk_prob", False)
    return MoE(
        config.require_int("hidden_size"),
        config.require_int("moe_intermediate_size", minimum=1),
        Route(experts, top_k, Scoring.SOFTMAX_ALL, normalise=normalise),
    )
