"""GLM-4.5 to 4.7, dots.llm1, Solar Open, Sarvam-30B: grouped-query attention under DeepSeek-V3's
routing; they differ in biases, norms of q and k, and how much of a head is rotated.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.errors import UnsupportedError
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_window,
)
from hmc.models.family import LANGUAGE_MODEL, NO_IMAGES, Aside, Family, look_ahead
from hmc.models.rope import Rope, rope
from hmc.models.routing import dense_mlp, grouped_moe, is_routed


def build(config: ModelConfig) -> nn.Module:
    """The model of a GLM-4.5 config.json."""
    angles = rope(config, attention_heads(config)[2], partial=0.5)
    bias = config.get_bool("attention_bias", False)
    return _model(config, angles, bias=bias, qk_norm=_by_head(config, False))


def build_dots1(config: ModelConfig) -> nn.Module:
    """The model of a dots.llm1 config.json."""
    depth = config.require_int("num_hidden_layers")
    if config.get_int("max_window_layers", depth) < depth:
        check_window(config)
    bias = config.get_bool("attention_bias", False)
    angles = rope(config, attention_heads(config)[2])
    return _model(config, angles, normalise=False, bias=bias, out_bias=bias, qk_norm="head")


def build_solar(config: ModelConfig) -> nn.Module:
    """The model of a Solar Open config.json."""
    angles = rope(config, attention_heads(config)[2], default_theta=1e6)
    return _model(config, angles, bias=config.get_bool("attention_bias", False))


def build_sarvam(config: ModelConfig) -> nn.Module:
    """The model of a Sarvam-30B config.json; q, k and v lie in one tensor."""
    angles = rope(config, attention_heads(config)[2], default_theta=8e6)
    for key in ("use_qkv_bias", "attention_bias", "use_bias"):
        if config.get_bool(key, False):
            raise UnsupportedError(f"{config.path}: {key} is true; hmc knows the family without")
    return _model(config, angles, qk_norm=_by_head(config, True), fused="query_key_value.weight")


def _by_head(config: ModelConfig, default: bool) -> str:
    return "head" if config.get_bool("use_qk_norm", default) else ""


def _model(
    config: ModelConfig, angles: Rope, normalise: bool = True, **attention: Any
) -> nn.Module:
    def layer(index: int) -> nn.Module:
        routed = is_routed(config, index)
        mlp = grouped_moe(config, normalise=normalise) if routed else dense_mlp(config)
        return DecoderLayer(config, GroupedQueryAttention(config, angles, **attention), mlp)

    return CausalLM(config, layer)


_ROUTING = "sigmoid routing in groups, shared experts"

FAMILIES = (
    Family(
        "glm4_moe",
        build,
        f"{_ROUTING}, half of each head rotated",
        ("zai-org/GLM-4.5", "zai-org/GLM-4.5-Air", "zai-org/GLM-4.6", "zai-org/GLM-4.7"),
        aside=look_ahead,
    ),
    Family(
        "glm4v_moe",
        build,
        f"{_ROUTING}, half of each head rotated; text alone",
        ("zai-org/GLM-4.5V", "zai-org/GLM-4.6V"),
        names=LANGUAGE_MODEL,
        aside=lambda config: (Aside("model.visual.*", NO_IMAGES), *look_ahead(config)),
    ),
    Family(
        "dots1",
        build_dots1,
        f"{_ROUTING}, norms of q and k by head",
        ("rednote-hilab/dots.llm1.inst",),
    ),
    Family("solar_open", build_solar, _ROUTING, ("upstage/Solar-Open-100B",)),
    Family(
        "sarvam_moe",
        build_sarvam,
        f"{_ROUTING}, norms of q and k by head, one tensor of q, k and v",
        ("sarvamai/sarvam-30b",),
        names=(
            (r"\.embed_tokens\.", ".word_embeddings."),
            (r"\.self_attn\.o_proj\.", ".self_attn.dense."),
            (r"\.self_attn\.q_norm\.", ".self_attn.query_layernorm."),
            (r"\.self_attn\.k_norm\.", ".self_attn.key_layernorm."),
            (r"\.self_attn\.", ".attention."),
            (r"e_score_correction_bias$", "expert_bias"),
        ),
    ),
)
