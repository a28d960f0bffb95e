"""LFM2 MoE: most layers mix tokens by a short convolution between two gates instead of attention;
sigmoid routing with a bias for the choice, the first layers dense.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import Conv, Linear, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    Norms,
    attention_heads,
)
from hmc.models.family import W123, Family
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp, routed_experts
from hmc.models.windows import FULL

CONV = "conv"
LEAST_SUM = 1e-6
"""What is added to the sum that weights are divided by."""


class ShortConv(nn.Module):
    """c * conv(b * x), where b, c and x are projections of a token: [T, hidden] -> [T, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.hidden = config.require_int("hidden_size")
        bias = config.get_bool("conv_bias", False)
        taps = config.get_int("conv_L_cache", 3, minimum=2)
        self.in_proj = Linear(self.hidden, 3 * self.hidden, bias=bias)
        self.conv = Conv(self.hidden, taps, bias=bias)
        self.out_proj = Linear(self.hidden, self.hidden, bias=bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        size, every = self.hidden, self.in_proj(x)
        b, c, x = every[..., :size], every[..., size : 2 * size], every[..., 2 * size :]
        return self.out_proj(c * self.conv(b * x))  # type: ignore[no-any-return]


def build(config: ModelConfig) -> nn.Module:
    """The model of an LFM2 MoE config.json; embeddings are tied where it does not say otherwise."""
    depth, dense = config.require_int("num_hidden_layers"), config.get_int("num_dense_layers", 2)
    kinds = config.get_strs("layer_types")
    if len(kinds) < depth or {*kinds} - {CONV, FULL}:
        raise config.error("layer_types", f"must say {CONV} or {FULL} for each of {depth} layers")
    tied = config.get_bool("tie_embedding", config.get_bool("tie_word_embeddings", True))
    angles = rope(config, attention_heads(config)[2], default_theta=1e6)
    norms = Norms("operator_norm", "", "ffn_norm")

    def layer(index: int) -> nn.Module:
        conv = kinds[index] == CONV
        mixer = ShortConv(config) if conv else GroupedQueryAttention(config, angles, qk_norm="head")
        mlp = dense_mlp(config) if index < dense else _routed(config)
        return DecoderLayer(config, mixer, mlp, norms)

    return CausalLM(config.with_text(tie_word_embeddings=tied), layer)


def _routed(config: ModelConfig) -> MoE:
    experts, top_k = routed_experts(config, "num_experts")
    route = Route(
        experts,
        top_k,
        Scoring.SIGMOID,
        normalise=config.get_bool("norm_topk_prob", True),
        factor=config.get_float("routed_scaling_factor", 1.0),
        eps=LEAST_SUM,
        bias_name="expert_bias" if config.get_bool("use_expert_bias", True) else None,
    )
    width = config.require_int("moe_intermediate_size", minimum=1)
    return MoE(config.require_int("hidden_size"), width, route)


FAMILIES = (
    Family(
        "lfm2_moe",
        build,
        "short convolutions between gates, norms of q and k by head, sigmoid routing with a bias",
        ("LiquidAI/LFM2-8B-A1B",),
        names=(
            (r"\.self_attn\.(in_proj|conv|out_proj)\.", r".conv.\1."),
            (r"\.self_attn\.o_proj\.", ".self_attn.out_proj."),
            (r"\.self_attn\.(q|k)_norm\.", r".self_attn.\1_layernorm."),
            (r"^model\.norm\.", "model.embedding_norm."),
            (r"\.mlp\.gate_proj\.", ".mlp.w1."),
            (r"\.mlp\.up_proj\.", ".mlp.w3."),
            (r"\.mlp\.down_proj\.", ".mlp.w2."),
            *W123,
            (r"\.mlp\.", ".feed_forward."),
        ),
    ),
)
