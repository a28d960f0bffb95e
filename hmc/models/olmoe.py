"""OLMoE and FlexOlmo: grouped-query attention with norms over the whole projections of q and k;
every layer routed by softmax. FlexOlmo norms what comes out of attention and MLP, not what goes in.
"""

from __future__ import annotations

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    Norms,
    attention_heads,
)
from hmc.models.family import Family
from hmc.models.rope import rope
from hmc.models.routing import softmax_moe


def build(config: ModelConfig) -> nn.Module:
    """The model of an OLMoE config.json."""
    return _model(config, Norms(), clip=config.get_float("clip_qkv", 0.0))


def build_flex(config: ModelConfig) -> nn.Module:
    """The model of a FlexOlmo config.json."""
    norms = Norms("", "post_attention_layernorm", "", "post_feedforward_layernorm")
    return _model(config, norms, default_theta=5e5)


def _model(
    config: ModelConfig, norms: Norms, *, clip: float = 0.0, default_theta: float = 1e4
) -> nn.Module:
    angles = rope(config, attention_heads(config)[2], default_theta)
    bias = config.get_bool("attention_bias", False)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(
            config, angles, bias=bias, out_bias=bias, qk_norm="width", clip=clip
        )
        return DecoderLayer(config, attention, softmax_moe(config, "intermediate_size"), norms)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "olmoe",
        build,
        "norms of q and k over the projection",
        ("allenai/OLMoE-1B-7B-0924", "allenai/OLMoE-1B-7B-0125-Instruct"),
    ),
    Family(
        "flex_olmo",
        build_flex,
        "norms of q and k over the projection, norms after attention and MLP alone",
        ("allenai/FlexOlmo-7x7B-1T",),
    ),
)
