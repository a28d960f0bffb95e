"""Hunyuan 3: grouped-query attention with norms of q and k by head; sigmoid routing with a
correction bias, shared experts.
"""

from __future__ import annotations

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import CausalLM, DecoderLayer, GroupedQueryAttention, attention_heads
from hmc.models.family import Family, look_ahead
from hmc.models.rope import rope
from hmc.models.routing import biased_moe, dense_mlp, is_routed, shared_experts


def build(config: ModelConfig) -> nn.Module:
    """The model of a Hunyuan 3 config.json."""
    angles = rope(config, attention_heads(config)[2], default_theta=11_158_840.0)
    bias = config.get_bool("attention_bias", False)

    def routed() -> nn.Module:
        return biased_moe(
            config,
            config.require_int("moe_intermediate_size", minimum=1),
            factor=config.require_float("router_scaling_factor"),
            shared=shared_experts(config, "num_shared_experts"),
        )

    def layer(index: int) -> nn.Module:
        mlp = routed() if is_routed(config, index, first=1) else dense_mlp(config)
        attention = GroupedQueryAttention(config, angles, bias=bias, out_bias=bias, qk_norm="head")
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "hy_v3",
        build,
        "norms of q and k by head, sigmoid routing with a bias, shared experts",
        ("tencent/Hy3-preview",),
        names=(
            (r"\.mlp\.gate\.", ".mlp.router.gate."),
            (r"\.mlp\.e_score_correction_bias", ".mlp.expert_bias"),
            (r"\.mlp\.shared_experts\.", ".mlp.shared_mlp."),
        ),
        aside=look_ahead,
    ),
)
