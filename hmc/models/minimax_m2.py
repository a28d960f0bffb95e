"""MiniMax-M2 to M2.7: grouped-query attention, half of each head rotated, with norms over the whole
projections of q and k; sigmoid routing with a correction bias.
"""

from __future__ import annotations

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_values,
)
from hmc.models.family import W123, Family
from hmc.models.rope import rope
from hmc.models.routing import biased_moe


def build(config: ModelConfig) -> nn.Module:
    """The model of a MiniMax-M2 config.json, which says `rotary_dim` elements of each head."""
    check_values(
        config,
        use_qk_norm=True,
        qk_norm_type="per_layer",
        scoring_func="sigmoid",
        use_routing_bias=True,
        shared_intermediate_size=0,
    )
    dim = attention_heads(config)[2]
    share = config.get_int("rotary_dim", dim, minimum=2) / dim
    angles = rope(config, dim, default_theta=5e6, partial=share)
    width = config.require_int("intermediate_size", minimum=1)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(config, angles, qk_norm="width")
        return DecoderLayer(config, attention, biased_moe(config, width))

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "minimax_m2",
        build,
        "norms of q and k over the projection, part of each head rotated, sigmoid routing",
        ("MiniMaxAI/MiniMax-M2", "MiniMaxAI/MiniMax-M2.5"),
        names=((r"\.mlp\.", ".block_sparse_moe."), *W123),
    ),
)
