"""Qwen3-MoE: grouped-query attention with per-head norms of q and k; routed layers among optional
dense ones. Qwen3-VL-MoE: the same, stacked; of tokens of text alone, the three positions that its
rotary embedding takes from parts of a head are one. Qwen2-MoE: biases instead of the norms, and a
shared expert with a gate of its own.
"""

from __future__ import annotations

from typing import Any

from torch import nn

from hmc.blocks import GatedMLP
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_values,
    check_window,
)
from hmc.models.family import LANGUAGE_MODEL, NO_IMAGES, Aside, Family
from hmc.models.rope import rope
from hmc.models.routing import Stacking, dense_mlp, softmax_moe


def build(config: ModelConfig) -> nn.Module:
    """The model of a Qwen3-MoE config.json."""
    return _by_head(config)


def build_vl(config: ModelConfig) -> nn.Module:
    """The model of the text part of a Qwen3-VL-MoE config.json; weights always sum to 1."""
    check_values(config, norm_topk_prob=True)
    config = config.with_text(norm_topk_prob=True)
    return _by_head(config, "columns")


def build_qwen2(config: ModelConfig) -> nn.Module:
    """The model of a Qwen2-MoE config.json."""
    width = config.require_int("shared_expert_intermediate_size", minimum=1)
    return _model(config, shared=width, bias=config.get_bool("qkv_bias", True))


def _by_head(config: ModelConfig, stacks: Stacking = "") -> nn.Module:
    bias = config.get_bool("attention_bias", False)
    return _model(config, stacks=stacks, bias=bias, out_bias=bias, qk_norm="head")


def _model(
    config: ModelConfig, shared: int = 0, stacks: Stacking = "", **attention: Any
) -> nn.Module:
    """`shared` is the width of the shared expert, `stacks` says how experts lie (`softmax_moe`),
    `attention` are options of the attention.
    """
    if config.get_bool("use_sliding_window", False):
        check_window(config)
    hidden = config.require_int("hidden_size")
    angles = rope(config, attention_heads(config)[2])
    dense = config.get_ints("mlp_only_layers")
    step = config.get_int("decoder_sparse_step", 1, minimum=1)

    def layer(index: int) -> nn.Module:
        if index not in dense and (index + 1) % step == 0:
            beside = GatedMLP(hidden, shared) if shared else None
            mlp: nn.Module = softmax_moe(config, shared=beside, stacks=stacks)
        else:
            mlp = dense_mlp(config)
        return DecoderLayer(config, GroupedQueryAttention(config, angles, **attention), mlp)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "qwen3_moe",
        build,
        "norms of q and k by head",
        ("Qwen/Qwen3-30B-A3B", "Qwen/Qwen3-235B-A22B", "Qwen/Qwen3-Coder-480B-A35B-Instruct"),
    ),
    Family(
        "qwen3_vl_moe",
        build_vl,
        "norms of q and k by head, stacked experts; text alone",
        ("Qwen/Qwen3-VL-30B-A3B-Instruct", "Qwen/Qwen3-VL-235B-A22B-Instruct"),
        names=LANGUAGE_MODEL,
        aside=lambda config: (Aside("model.visual.*", NO_IMAGES),),
    ),
    Family(
        "qwen2_moe",
        build_qwen2,
        "biases of q, k and v, a shared expert with a gate",
        ("Qwen/Qwen1.5-MoE-A2.7B", "Qwen/Qwen2-57B-A14B-Instruct"),
        names=(
            (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
            (r"\.mlp\.shared_gate\.", ".mlp.shared_expert_gate."),
        ),
    ),
)
