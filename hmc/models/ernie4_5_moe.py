"""ERNIE 4.5: grouped-query attention whose rotary embedding turns neighbours; routed layers among
dense ones by softmax, with a bias for the choice alone.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    attention_heads,
    check_values,
)
from hmc.models.family import LOOKS_AHEAD, Aside, Family
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp, routed_experts, shared_experts

LEAST_SUM = 1e-9
"""A floor of the sum that weights are divided by, so low that chosen experts would need to have
less than a billionth of the probability for it to count.
"""


def build(config: ModelConfig) -> nn.Module:
    """The model of an ERNIE 4.5 config.json."""
    check_values(config, use_bias=False)
    if not 0 <= config.get_float("moe_norm_min", 0.0) <= LEAST_SUM:
        raise config.unsupported("moe_norm_min", f"numbers up to {LEAST_SUM:g}")
    tied = config.get_bool("tie_word_embeddings", True)
    angles = rope(config, attention_heads(config)[2], default_theta=500_000.0)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(config, angles, interleaved=True)
        mlp = _routed(config) if _is_routed(config, index) else dense_mlp(config)
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config.with_text(tie_word_embeddings=tied), layer)


def _is_routed(config: ModelConfig, index: int) -> bool:
    """Every so many of the layers from one to another."""
    first = config.get_int("moe_layer_start_index", 1)
    last = config.get_int("moe_layer_end_index", -1, minimum=-1)
    step = config.get_int("moe_layer_interval", 1, minimum=1)
    return (index + 1) % step == 0 and index >= first and (last < 0 or index <= last)


def _routed(config: ModelConfig) -> MoE:
    experts, top_k = routed_experts(config, "moe_num_experts", chosen="moe_k")
    bias = "moe_statics.e_score_correction_bias"
    return MoE(
        config.require_int("hidden_size"),
        config.require_int("moe_intermediate_size", minimum=1),
        Route(experts, top_k, Scoring.SOFTMAX_ALL, normalise=True, bias_name=bias),
        shared_experts(config, "moe_num_shared_experts"),
    )


FAMILIES = (
    Family(
        "ernie4_5_moe",
        build,
        "rotary embedding of neighbours, a bias for the choice of experts, shared experts",
        ("baidu/ERNIE-4.5-21B-A3B-PT", "baidu/ERNIE-4.5-300B-A47B-PT"),
        aside=lambda config: (Aside("model.mtp_*", LOOKS_AHEAD),),
    ),
)
