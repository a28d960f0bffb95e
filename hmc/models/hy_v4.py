"""Hy4: latent attention to positions that indexers choose, with sinks and gates; layers may share a
choice. Residual streams are read and written through sigmoid gates, and not mixed; routed experts
are bounded, and lie in stacks.

Rotary embedding pairs element i of the rotated part with the one half of it further on, as
transformers 5.24 does, in attention and indexers; neighbours where the configuration says
`rope_interleave`. vLLM and llama.cpp pair neighbours in the published files.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.blocks import Linear
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import ACTIVATIONS, gated
from hmc.models.common import CausalLM, check_values, norm_eps
from hmc.models.deepseek_v32 import Indexer, Latest, sharing, unused_indexers
from hmc.models.family import LOOKS_AHEAD, Aside, Family
from hmc.models.latent import Indexer as Chooses
from hmc.models.latent import LatentAttention
from hmc.models.rope import Rope, rope
from hmc.models.routing import dense_mlp, grouped_moe, is_routed
from hmc.models.streams import Half, LastRead, StreamLayer, spread
from hmc.ops.hyper import WRITTEN


class GatedSparseAttention(LatentAttention):
    """Each element of what heads mixed is multiplied by the sigmoid of a gate."""

    def __init__(self, config: ModelConfig, angles: Rope, indexer: Chooses) -> None:
        super().__init__(config, angles, indexer=indexer, sinks="learnable_sink_param")
        self.linear_gate = Linear(config.require_int("hidden_size"), self.mla.width)

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        return mixed * torch.sigmoid(self.linear_gate(x))


def build(config: ModelConfig) -> nn.Module:
    """The model of a Hy4 config.json."""
    check_values(config, hidden_act="silu", attention_bias=False)
    pairs = config.get_bool("rope_interleave", False)
    config = _with_kinds(config.with_text(rope_interleave=pairs))
    angles = rope(config, config.require_int("qk_rope_head_dim", minimum=2))
    magnitude = config.get_float("hc_magnitude", 2.0)
    limit = max(0.0, config.get_float("swiglu_limit", 10.0))
    act = gated(ACTIVATIONS["silu"], limit=limit)
    latest, shares, eps = Latest(), sharing(config), norm_eps(config)

    def layer(index: int) -> nn.Module:
        indexer: Chooses = latest
        if not shares[index]:
            indexer = Indexer(config, angles, latest, interleaved=pairs, at_end=True, eps=eps)
        attention = GatedSparseAttention(config, angles, indexer)
        if is_routed(config, index, 1):
            mlp: nn.Module = grouped_moe(config, factor=2.827, act=act, stacks=True)
        else:
            mlp = dense_mlp(config)
        return StreamLayer(*(Half(config, each, WRITTEN, magnitude) for each in (attention, mlp)))

    return CausalLM(config, layer, hyper=(spread(config), LastRead(config)))


def _with_kinds(config: ModelConfig) -> ModelConfig:
    """Where nothing says which layers have indexers, the first has and every fourth from the second
    on.
    """
    if any(key in config for key in ("indexer_types", "index_topk_pattern", "index_topk_freq")):
        return config
    depth = range(config.require_int("num_hidden_layers"))
    kinds = ["full" if index == 0 or index % 4 == 1 else "shared" for index in depth]
    return config.with_text(indexer_types=kinds)


def _aside(config: ModelConfig) -> tuple[Aside, ...]:
    return *unused_indexers(_with_kinds(config)), Aside("model.mtp_layers.*", LOOKS_AHEAD)


FAMILIES = (
    Family(
        "hy_v4",
        build,
        "latent attention with gates and sinks to tokens that an indexer chooses, layers share a"
        " choice; hyper-connections, sigmoid routing, shared experts",
        ("tencent/Hy4-preview",),
        names=(
            (r"\.attn\.hc\.(fn|base|scale)(\.weight)?$", r".hc_attn_layer.hc_pre.hc_\1"),
            (r"\.ffn\.hc\.(fn|base|scale)(\.weight)?$", r".hc_mlp_layer.hc_pre.hc_\1"),
            (r"\.hc_head\.(fn|base|scale)(\.weight)?$", r".hc_head.hc_head_\1"),
            (r"\.attn\.norm\.", ".input_layernorm."),
            (r"\.ffn\.norm\.", ".post_attention_layernorm."),
            (r"\.attn\.inner\.", ".self_attn."),
            (r"\.ffn\.inner\.", ".mlp."),
        ),
        aside=_aside,
    ),
)
