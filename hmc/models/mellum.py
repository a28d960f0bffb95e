"""Mellum 2: Qwen3-MoE with sliding windows, and rotary embedding by layer type."""

from __future__ import annotations

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import CausalLM, DecoderLayer, GroupedQueryAttention, attention_heads
from hmc.models.family import LOOKS_AHEAD, Aside, Family
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp, is_routed, softmax_moe
from hmc.models.windows import layer_types, window


def build(config: ModelConfig) -> nn.Module:
    """The model of a Mellum config.json."""
    kinds = layer_types(config)
    dim, bias = attention_heads(config)[2], config.get_bool("attention_bias", False)
    angles = {kind: rope(config, dim, layer_type=kind) for kind in {*kinds}}

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(
            config,
            angles[kinds[index]],
            bias=bias,
            out_bias=bias,
            qk_norm="head",
            window=window(config, kinds[index]),
        )
        mlp = softmax_moe(config) if is_routed(config, index) else dense_mlp(config)
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "mellum",
        build,
        "norms of q and k by head, sliding windows, rope by layer type",
        ("JetBrains/Mellum2-12B-A2.5B-Base",),
        aside=lambda config: (Aside("mtp.*", LOOKS_AHEAD),),
    ),
)
