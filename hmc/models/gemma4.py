"""Gemma 4 with experts: sliding layers and full ones, which have heads of their own, whose keys may
be the values too, and which turn the first pairs of a head; values of unit length; a dense MLP
beside the routed one, each between norms; scaled embeddings and layers; soft cap of the logits.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import Attention, Experts, Linear, Route, Scoring, Vector
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    Norms,
    attention_heads,
    check_values,
    hidden_norm,
    norm_eps,
)
from hmc.models.family import LANGUAGE_MODEL, NO_IMAGES, Aside, Family
from hmc.models.norms import unit
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp
from hmc.models.stacks import stacked
from hmc.models.windows import FULL, layer_types, window

NORMS = Norms(
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def build(config: ModelConfig) -> nn.Module:
    """The model of the text part of a Gemma 4 config.json with experts."""
    check_values(config, num_kv_shared_layers=0, use_double_wide_mlp=False)
    check_values(config, use_bidirectional_attention="vision")
    if not config.get_bool("enable_moe_block", False):
        raise config.unsupported("enable_moe_block", "true")
    if config.get_int("hidden_size_per_layer_input", 256):
        raise config.unsupported("hidden_size_per_layer_input", "0")
    kinds = layer_types(config, every=6)[:-1]
    return CausalLM(
        config,
        lambda index: Layer(config, (*kinds, FULL)[index]),
        embed_scale=config.require_int("hidden_size") ** 0.5,
        logit_cap=config.get_float("final_logit_softcapping", 0.0),
    )


class Layer(DecoderLayer):
    """The routed MLP reads what the dense one does, through another norm."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__(config, UnitValues(config, kind), dense_mlp(config), NORMS)
        self.router = Router(config)
        hidden, width = (
            config.require_int(key, minimum=1) for key in ("hidden_size", "moe_intermediate_size")
        )
        route = self.router.route
        sizes = route.experts, hidden, width
        self.experts = Experts(*sizes, route.top_k, stacked=stacked(*sizes))
        self.post_feedforward_layernorm_1 = hidden_norm(config)
        self.pre_feedforward_layernorm_2 = hidden_norm(config)
        self.post_feedforward_layernorm_2 = hidden_norm(config)
        self.layer_scalar = Vector(1)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self._norm(NORMS.attention_in, h)
        h = h + self._norm(NORMS.attention_out, self.self_attn(x, positions))
        dense = self.mlp(self._norm(NORMS.mlp_in, h))
        routed = self.experts(self.pre_feedforward_layernorm_2(h), self.router(h))
        both = self.post_feedforward_layernorm_1(dense) + self.post_feedforward_layernorm_2(routed)
        return (h + self._norm(NORMS.mlp_out, both)) * self.layer_scalar()  # type: ignore[no-any-return]


class Router(nn.Module):
    """Softmax over all experts of rows of unit length times a scale; weights of the chosen are
    renormalised and times a scale of each expert.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        experts, top_k = (
            config.require_int(key, minimum=1) for key in ("num_experts", "top_k_experts")
        )
        if top_k > experts:
            raise config.error("top_k_experts", f"is {top_k}, more than the {experts} experts")
        self.eps, self.by = norm_eps(config), hidden**-0.5
        self.scale = Vector(hidden)
        self.proj = Linear(hidden, experts)
        self.route = Route(
            experts, top_k, Scoring.SOFTMAX_ALL, normalise=True, scale_name="per_expert_scale"
        )

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        return self.route(self.proj(unit(h, self.eps) * self.scale() * self.by))  # type: ignore[no-any-return]


class UnitValues(GroupedQueryAttention):
    """Norms of q and k by head, of values too but without weights; scores as they are. Full layers
    have heads of their own, and their keys before the norm are the values where the configuration
    says `attention_k_eq_v`.
    """

    def __init__(self, config: ModelConfig, kind: str) -> None:
        count, kv_count, dim = attention_heads(config)
        self.shared = kind == FULL and config.get_bool("attention_k_eq_v", False)
        if kind == FULL:
            dim = config.get_int("global_head_dim", 512, minimum=1)
        if self.shared:
            kv_count = config.get_int("num_global_key_value_heads", kv_count, minimum=1)
        if count % kv_count:
            raise config.error("num_global_key_value_heads", f"is {kv_count}, of {count} heads")
        bias = config.get_bool("attention_bias", False)
        super().__init__(
            config,
            rope(config, dim, partial=1.0, layer_type=kind),
            bias=bias,
            out_bias=bias,
            qk_norm="head",
            heads=(count, kv_count, dim),
        )
        if self.shared:
            del self.v_proj
        self.attention = Attention(count, kv_count, dim, dim, 1.0, window=window(config, kind))
        self.kv_count, self.eps = kv_count, norm_eps(config)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        k = self.k_proj(x)
        v = k if self.shared else self.v_proj(x)
        q, k = self._normed(self.q_proj(x), k)
        q, k = self.q_rotary(q, positions), self.k_rotary(k, positions)  # type: ignore[misc]
        v = unit(v.unflatten(-1, (self.kv_count, -1)), self.eps).flatten(-2)
        return self.o_proj(self.attention(q, k, v))  # type: ignore[no-any-return]


def _towers(config: ModelConfig) -> tuple[Aside, ...]:
    images = (Aside(f"model.{name}.*", NO_IMAGES) for name in ("vision_tower", "embed_vision"))
    sounds = (Aside(f"model.{name}.*", NO_SOUND) for name in ("audio_tower", "embed_audio"))
    return *images, *sounds


NO_SOUND = "sound is not read"

FAMILIES = (
    Family(
        "gemma4",
        build,
        "sliding windows, heads and rope by layer type, keys that are values, norms around each"
        " half of a layer, a dense MLP beside the experts, GELU, soft cap of logits; text alone",
        ("google/gemma-4-26B-A4B-it",),
        names=LANGUAGE_MODEL,
        aside=_towers,
    ),
)
