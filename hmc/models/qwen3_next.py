"""Qwen3-Next and Qwen3.5-MoE: gated delta nets, and every few layers grouped-query attention with a
gate on its result; norms with 1 + weight, softmax routing, a shared expert with a gate of its own.
Of tokens of text alone, the three positions that Qwen3.5's rotary embedding takes are one.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import partial

import torch
from torch import Tensor, nn

from hmc.blocks import GatedMLP, Linear, RMSNorm
from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.views import View
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    SizedNorm,
    attention_heads,
    check_values,
    norm_eps,
)
from hmc.models.converted import converted
from hmc.models.delta import LINEAR, GatedDeltaNet, Heads, kinds_of_layers
from hmc.models.family import LANGUAGE_MODEL, LOOKS_AHEAD, NO_IMAGES, Aside, Family, look_ahead
from hmc.models.norms import CentredNorm
from hmc.models.rope import Rope, rope
from hmc.models.routing import Stacking, dense_mlp, softmax_moe


class GatedAttention(GroupedQueryAttention):
    """What comes out of attention is multiplied by the sigmoid of a gate, whose rows lie beside
    those of q, head by head in one tensor.
    """

    def __init__(self, config: ModelConfig, angles: Rope) -> None:
        super().__init__(config, angles, qk_norm="head", norm=_kind_of_norm(config))
        hidden = config.require_int("hidden_size")
        count, _, dim = attention_heads(config)

        def half(first: int) -> Linear:
            view = View((2 * count * dim, hidden), first, 2 * dim, run=dim)
            return Linear(hidden, count * dim, within=("q_proj.weight", view))

        self.q_proj, self.gate_proj = half(0), half(dim)

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        return mixed * torch.sigmoid(self.gate_proj(x))


def build(config: ModelConfig) -> nn.Module:
    """The model of a Qwen3-Next config.json."""
    return _model(config, grouped=config.get_strs("grouped_projections") or ("qkvz", "ba"))


def build_qwen3_5(config: ModelConfig) -> nn.Module:
    """The model of the text part of a Qwen3.5-MoE config.json; weights always sum to 1."""
    check_values(config, norm_topk_prob=True)
    return _model(config.with_text(norm_topk_prob=True), stacks="rows", tiled=converted(config))


def _model(
    config: ModelConfig,
    *,
    grouped: Collection[str] = (),
    stacks: Stacking = "",
    tiled: bool = False,
) -> nn.Module:
    """`grouped` and `tiled` say how the delta net's projections and heads lie (`GatedDeltaNet`),
    `stacks` how experts do (`softmax_moe`) that are not one by one.
    """
    check_values(config, attention_bias=False)
    hidden = config.require_int("hidden_size")
    shared = config.require_int("shared_expert_intermediate_size", minimum=1)
    kinds = kinds_of_layers(config, "full_attention_interval", 4)
    angles = rope(config, attention_heads(config)[2], partial=0.25)
    heads, filed = _heads(config), converted(config)
    net = partial(GatedDeltaNet, grouped=grouped, log=not filed, tiled=tiled)
    stacks = "" if filed else stacks
    dense = config.get_ints("mlp_only_layers")
    step = config.get_int("decoder_sparse_step", 1, minimum=1)

    def layer(index: int) -> nn.Module:
        if kinds[index] == LINEAR:
            mixer: nn.Module = net(hidden, heads, norm_eps(config))
        else:
            mixer = GatedAttention(config, angles)
        if index not in dense and (index + 1) % step == 0:
            mlp: nn.Module = softmax_moe(config, shared=GatedMLP(hidden, shared), stacks=stacks)
        else:
            mlp = dense_mlp(config)
        return DecoderLayer(config, mixer, mlp, norm=_norm)

    return CausalLM(config, layer, norm=_norm)


def _norm(config: ModelConfig) -> nn.Module:
    return _kind_of_norm(config)(config.require_int("hidden_size"), norm_eps(config), 1)


def _kind_of_norm(config: ModelConfig) -> SizedNorm:
    """Of hidden states, queries and keys; converters to GGUF add the 1 to weights."""
    return CentredNorm if config.get_bool("zero_centered", True) else RMSNorm


def _heads(config: ModelConfig) -> Heads:
    keys = ("num_value_heads", "num_key_heads", "key_head_dim", "value_head_dim")
    total, count, key_dim, value_dim = (
        config.require_int(f"linear_{key}", minimum=1) for key in keys
    )
    taps = config.require_int("linear_conv_kernel_dim", minimum=2)
    if total % count:
        raise config.error("linear_num_key_heads", f"is {count}, must divide the {total} heads")
    return Heads(total, count, key_dim, value_dim, taps)


_NEEDS = (
    "gated delta nets, gated attention, a quarter of each head rotated, norms with 1 + weight, a"
    " shared expert with a gate"
)
_NAMES = (
    (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
    (r"\.mlp\.shared_gate\.", ".mlp.shared_expert_gate."),
    (r"\.self_attn\.((in_proj|conv|norm|out_proj)[^.]*\.|A_log|dt_bias)", r".linear_attn.\1"),
)
_AHEAD = Aside("mtp.*", LOOKS_AHEAD)

FAMILIES = (
    Family(
        "qwen3_next",
        build,
        _NEEDS,
        (
            "Qwen/Qwen3-Next-80B-A3B-Instruct",
            "Qwen/Qwen3-Next-80B-A3B-Thinking",
            "Qwen/Qwen3-Coder-Next",
        ),
        names=_NAMES,
        aside=lambda config: (_AHEAD,),
    ),
    Family(
        "qwen3_5_moe",
        build_qwen3_5,
        f"{_NEEDS}, stacked experts; text alone",
        ("Qwen/Qwen3.5-35B-A3B", "Qwen/Qwen3.5-122B-A10B", "Qwen/Qwen3.5-397B-A17B"),
        names=(*_NAMES, *LANGUAGE_MODEL),
        aside=lambda config: (_AHEAD, Aside("model.visual.*", NO_IMAGES), *look_ahead(config)),
    ),
)
