"""A family from outside the tree: Qwen3-MoE's attention and routing, with norms before and after
each half of a layer, and logits that stay below a cap.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.checkpoint.config import ModelConfig
from hmc.models import Family
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    Norms,
    attention_heads,
)
from hmc.models.rope import rope
from hmc.models.routing import softmax_moe

NORMS = Norms("norm_1", "norm_2", "norm_3", "norm_4")


class Capped(CausalLM):
    """A decoder whose logits lie between -cap and cap."""

    def __init__(self, config: ModelConfig) -> None:
        angles = rope(config, attention_heads(config)[2])

        def layer(index: int) -> nn.Module:
            attention = GroupedQueryAttention(config, angles, qk_norm="head")
            return DecoderLayer(config, attention, softmax_moe(config), NORMS)

        super().__init__(config, layer)
        self.cap = config.require_float("logit_cap")

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        return torch.tanh(super().forward(ids, positions) / self.cap) * self.cap


FAMILY = Family(
    "capped_moe",
    Capped,
    "norms of q and k by head, norms around each half of a layer, capped logits",
    ("example/capped-moe",),
)
