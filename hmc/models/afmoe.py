"""Trinity (AFMoE): grouped-query attention with norms of q and k by head and a gate on its result;
most layers slide, the others see all tokens and know no positions; norms around each half of a
layer; sigmoid routing with a bias.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.blocks import Linear
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    Norms,
    attention_heads,
    check_values,
)
from hmc.models.family import Family
from hmc.models.rope import Rope, rope
from hmc.models.routing import biased_moe, dense_mlp, is_routed, shared_experts
from hmc.models.windows import SLIDING, layer_types, window

NORMS = Norms(
    "input_layernorm", "post_attention_layernorm", "pre_mlp_layernorm", "post_mlp_layernorm"
)


class GatedAttention(GroupedQueryAttention):
    """What comes out of attention is multiplied by the sigmoid of a projection of what went in."""

    def __init__(self, config: ModelConfig, angles: Rope, kind: str) -> None:
        bounds = window(config, kind)
        turned = angles if kind == SLIDING else None
        super().__init__(config, turned, qk_norm="head", window=bounds)
        self.gate_proj = Linear(config.require_int("hidden_size"), self.attention.width)

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        return mixed * torch.sigmoid(self.gate_proj(x))


def build(config: ModelConfig) -> nn.Module:
    """The model of an AFMoE config.json."""
    check_values(config, attention_bias=False, score_func="sigmoid", route_norm=True)
    hidden = config.require_int("hidden_size")
    kinds = layer_types(config, "global_attn_every_n_layers", 4)
    angles = rope(config, attention_heads(config)[2])
    first = config.get_int("num_dense_layers", 1)

    def layer(index: int) -> nn.Module:
        mlp: nn.Module = dense_mlp(config)
        if is_routed(config, index, first):
            mlp = biased_moe(
                config,
                config.require_int("moe_intermediate_size", minimum=1),
                factor=config.get_float("route_scale", 1.0),
                shared=shared_experts(config, "num_shared_experts"),
            )
        return DecoderLayer(config, GatedAttention(config, angles, kinds[index]), mlp, NORMS)

    scale = hidden**0.5 if config.get_bool("mup_enabled", False) else 1.0
    return CausalLM(config, layer, embed_scale=scale)


FAMILIES = (
    Family(
        "afmoe",
        build,
        "norms of q and k by head, sliding windows, layers without rope, gated attention, norms"
        " around each half of a layer, sigmoid routing with a bias",
        ("arcee-ai/Trinity-Mini", "arcee-ai/Trinity-Nano-Preview"),
        names=(
            (r"\.mlp\.gate\.", ".mlp.router.gate."),
            (r"\.mlp\.e_score_correction_bias$", ".mlp.expert_bias"),
        ),
    ),
)
