"""MiMo-V2-Flash: grouped-query attention whose sliding layers have sinks, and heads of keys and
rotary embedding of their own; a third of each head is rotated; values are scaled, and narrower than
keys; DeepSeek-V3's routing without shared experts.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_values,
)
from hmc.models.family import LOOKS_AHEAD, Aside, Family, look_ahead
from hmc.models.rope import Rope, rope
from hmc.models.routing import dense_mlp, grouped_moe
from hmc.models.windows import FULL, SLIDING

PARTIAL = 0.334


def build(config: ModelConfig) -> nn.Module:
    """The model of a MiMo-V2-Flash config.json; of sliding layers it says what differs in keys that
    begin with `swa_`.
    """
    check_values(
        config,
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        add_full_attention_sink_bias=False,
        add_swa_attention_sink_bias=True,
        n_shared_experts=0,
    )
    slides = _by_layer(config, "hybrid_layer_pattern")
    routed = _by_layer(config, "moe_layer_freq")
    full_kv = attention_heads(config)[1]
    heads = {FULL: _heads(config, "", full_kv), SLIDING: _heads(config, "swa_", 2 * full_kv)}
    window = config.require_int("sliding_window_size", minimum=1) + 1

    def layer(index: int) -> nn.Module:
        kind = SLIDING if slides[index] else FULL
        bounds: dict[str, Any] = (
            {"window": window, "sinks": "attention_sink_bias"} if slides[index] else {}
        )
        attention = GroupedQueryAttention(
            config,
            _rope(config, kind, heads[kind][2]),
            bias=config.get_bool("attention_bias", False),
            heads=heads[kind],
            v_dim=_size(config, "v_head_dim", kind),
            v_scale=config.get_float("attention_value_scale", 1.0),
            **bounds,
        )
        mlp = grouped_moe(config, factor=1.0) if routed[index] else dense_mlp(config)
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


def _by_layer(config: ModelConfig, key: str) -> tuple[int, ...]:
    found, depth = config.get_ints(key), config.require_int("num_hidden_layers")
    if len(found) < depth or {*found} - {0, 1}:
        raise config.error(key, f"must say 0 or 1 for each of {depth} layers")
    return found


def _size(config: ModelConfig, key: str, kind: str) -> int:
    full = config.require_int(key, minimum=1)
    return config.get_int(f"swa_{key}", full, minimum=1) if kind == SLIDING else full


def _heads(config: ModelConfig, prefix: str, kv_heads: int) -> tuple[int, int, int]:
    """Heads of full or sliding layers."""
    count, _, dim = attention_heads(config)
    kv_heads = config.get_int(f"{prefix}num_key_value_heads", kv_heads, minimum=1)
    count = config.get_int(f"{prefix}num_attention_heads", count, minimum=1)
    if count % kv_heads:
        raise config.error(f"{prefix}num_key_value_heads", f"is {kv_heads}, of {count} heads")
    return count, kv_heads, config.get_int(f"{prefix}head_dim", dim, minimum=1)


def _rope(config: ModelConfig, kind: str, dim: int) -> Rope:
    """`rope_parameters` by layer type, or `rope_theta` and `swa_rope_theta`."""
    if kind == SLIDING and "rope_parameters" not in config:
        theta = config.get_float("swa_rope_theta", 10_000.0)
        config = config.with_text(rope_theta=theta)
    return rope(config, dim, 5e6, partial=PARTIAL, layer_type=kind)


FAMILIES = (
    Family(
        "mimo_v2_flash",
        build,
        "sliding windows with sinks, heads and rope by layer type, part of each head rotated,"
        " scaled values, sigmoid routing in groups",
        ("XiaomiMiMo/MiMo-V2-Flash",),
        aside=lambda config: (Aside("model.mtp.*", LOOKS_AHEAD), *look_ahead(config)),
    ),
)
