"""Command A+ and North (Cohere2-MoE): attention and MLP beside each other after one norm without
means or with; most layers slide, the others see all tokens and know no positions; scores of the
chosen experts alone make their weights.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from hmc.blocks import GatedMLP, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    Norms,
    attention_heads,
    check_values,
    hidden_norm,
    norm_eps,
)
from hmc.models.family import LANGUAGE_MODEL, NO_IMAGES, Aside, Family, look_ahead
from hmc.models.norms import LayerNorm
from hmc.models.rope import rope
from hmc.models.routing import is_routed, routed_experts
from hmc.models.windows import SLIDING, layer_types, window

_CHOSEN = {"softmax": Scoring.SOFTMAX_CHOSEN, "sigmoid": Scoring.SIGMOID_CHOSEN}
_TOGETHER = {"sum": 1.0, "average": 0.5}


def build(config: ModelConfig) -> nn.Module:
    """The model of a Cohere2-MoE config.json."""
    check_values(config, use_qk_norm=False, use_parallel_block=True)
    kinds = _layer_types(config)
    angles = rope(config, attention_heads(config)[2])
    bias = config.get_bool("attention_bias", False)
    hidden = config.require_int("hidden_size")
    forced = config.get_int("prefix_dense_sliding_window_pattern", 1, minimum=1) == 1

    def layer(index: int) -> nn.Module:
        routed = is_routed(config, index)
        turned = kinds[index] == SLIDING or (forced and not routed)
        attention = GroupedQueryAttention(
            config,
            angles if turned else None,
            bias=bias,
            out_bias=bias,
            interleaved=True,
            window=window(config, kinds[index]),
        )
        width = config.require_int("prefix_dense_intermediate_size", minimum=1) if not routed else 0
        mlp = Weighed(config) if routed else GatedMLP(hidden, width)
        return DecoderLayer(config, attention, mlp, Norms(mlp_in=""), _norm, parallel=True)

    scale = config.get_float("logit_scale", 0.0625)
    tied = config.get_bool("tie_word_embeddings", True)
    config = config.with_text(tie_word_embeddings=tied)
    return CausalLM(config, layer, logit_scale=scale, norm=_norm)


def build_text(config: ModelConfig) -> nn.Module:
    """The model of the text part of a Cohere2-Vision config.json, where that has experts. Logits
    are scaled as in it alone; transformers 5.24 leaves that out beside a vision tower.
    """
    if config.get_str("model_type", "") != "cohere2_moe":
        raise config.unsupported("model_type", "cohere2_moe")
    return build(config)


class Weighed(MoE):
    """Routed and shared experts, whose results are added or averaged."""

    def __init__(self, config: ModelConfig) -> None:
        experts, top_k = routed_experts(config, "num_experts")
        scoring, together = (
            _known(config, key, default, table)
            for key, default, table in (
                ("expert_selection_fn", "softmax", _CHOSEN),
                ("shared_expert_combination_strategy", "average", _TOGETHER),
            )
        )
        hidden, width = (
            config.require_int(key, minimum=1) for key in ("hidden_size", "intermediate_size")
        )
        normalise = scoring == Scoring.SIGMOID_CHOSEN and config.get_bool("norm_topk_prob", True)
        shared = config.get_int("num_shared_experts", 0)
        super().__init__(
            hidden,
            width,
            Route(experts, top_k, scoring, normalise=normalise),
            GatedMLP(hidden, width * shared) if shared else None,
        )
        self.share = together if shared else 1.0

    def forward(self, x: Tensor) -> Tensor:
        found = super().forward(x)
        return found if self.share == 1.0 else found * self.share


def _known(config: ModelConfig, key: str, default: str, table: dict[str, Any]) -> Any:
    found = table.get(config.get_str(key, default))
    if found is None:
        raise config.unsupported(key, " and ".join(table))
    return found


def _norm(config: ModelConfig) -> nn.Module:
    if "rms_norm_eps" in config:
        return hidden_norm(config)
    return LayerNorm(config.require_int("hidden_size"), norm_eps(config))


def _layer_types(config: ModelConfig) -> tuple[str, ...]:
    """A pattern of its own for the dense layers, which come first."""
    if "layer_types" in config:
        return layer_types(config)
    depth, dense = (
        config.require_int("num_hidden_layers"),
        config.get_int("first_k_dense_replace", 0),
    )
    parts = (
        layer_types(config.with_text(num_hidden_layers=count), key, default)
        for count, key, default in (
            (min(dense, depth), "prefix_dense_sliding_window_pattern", 1),
            (max(depth - dense, 0), "sliding_window_pattern", 4),
        )
    )
    return tuple(kind for part in parts for kind in part)


def _vision(config: ModelConfig) -> tuple[Aside, ...]:
    names = ("vision_tower", "multi_modal_projector")
    return tuple(Aside(f"model.{name}.*", NO_IMAGES) for name in names)


_NEEDS = "sliding windows, layers without rope, parallel blocks, LayerNorm, scores of the chosen"

FAMILIES = (
    Family("cohere2_moe", build, _NEEDS, ("CohereLabs/North-Mini-Code-1.0",), aside=look_ahead),
    Family(
        "cohere2_vision",
        build_text,
        f"{_NEEDS}; text alone, of models with experts",
        ("CohereLabs/command-a-plus",),
        names=LANGUAGE_MODEL,
        aside=_vision,
    ),
)
