"""Kolibri 1: grouped-query attention with norms of q and k by head; four of five layers slide, the
fifth sees all tokens and knows no positions; norms around each half of a layer; experts chosen by
logits with a bias and weighed by the sigmoid of theirs, beside a shared one.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import GatedMLP, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    Norms,
    attention_heads,
)
from hmc.models.family import Family
from hmc.models.rope import rope
from hmc.models.routing import routed_experts
from hmc.models.windows import SLIDING, layer_types, window

NORMS = Norms(
    "input_layernorm",
    "post_attn_norm",
    "post_attention_layernorm",
    "post_ffn_norm",
)


def build(config: ModelConfig) -> nn.Module:
    """The model of a Kolibri 1 config.json."""
    hidden = config.require_int("hidden_size")
    kinds = layer_types(config, every=5)
    angles = rope(config, attention_heads(config)[2])
    experts, top_k = routed_experts(config, "num_experts", "num_local_experts")
    normalise = config.get_bool("norm_topk_prob", False)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(
            config,
            angles if kinds[index] == SLIDING else None,
            qk_norm="head",
            window=window(config, kinds[index]),
        )
        mlp = MoE(
            hidden,
            config.require_int("moe_intermediate_size", minimum=1),
            Route(
                experts,
                top_k,
                Scoring.SIGMOID_CHOSEN,
                normalise=normalise,
                bias_name="gate.e_score_correction_bias",
            ),
            GatedMLP(hidden, config.require_int("shared_expert_intermediate_size", minimum=1)),
        )
        return DecoderLayer(config, attention, mlp, NORMS)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "kolibri1",
        build,
        "norms of q and k by head, sliding windows, layers without rope, norms around each half of"
        " a layer, sigmoid scores of those chosen by biased logits",
        ("Aleph-Alpha/Kolibri-1",),
        names=((r"\.mlp\.gate\.e_score_correction_bias$", ".moe.router.expert_bias"),),
    ),
)
