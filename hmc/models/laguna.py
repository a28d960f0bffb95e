"""Laguna: grouped-query attention with norms of q and k by head and a softplus gate on its result;
layers differ in query heads, windows and rotary embedding; sigmoid routing with a bias.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks import GatedMLP, Linear
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    attention_heads,
    check_values,
)
from hmc.models.family import Family
from hmc.models.rope import Rope, rope
from hmc.models.routing import biased_moe, dense_mlp, is_routed
from hmc.models.windows import layer_types, window


class GatedAttention(GroupedQueryAttention):
    """What heads mixed is multiplied by the softplus of gates, one a head or one an element."""

    def __init__(
        self, config: ModelConfig, rope: Rope, heads: tuple[int, int, int], window: int
    ) -> None:
        bias = config.get_bool("attention_bias", False)
        super().__init__(
            config, rope, heads=heads, bias=bias, out_bias=bias, qk_norm="head", window=window
        )
        self.by_element = config.values.get("gating") == "per-element"
        self.heads, _, self.head_dim = heads
        gates = self.attention.width if self.by_element else self.heads
        self.g_proj = Linear(config.require_int("hidden_size"), gates)

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        gate = functional.softplus(self.g_proj(x))
        if self.by_element:
            return mixed * gate
        by_head = mixed.reshape(-1, self.heads, self.head_dim) * gate.unsqueeze(-1)
        return by_head.flatten(-2)


def build(config: ModelConfig) -> nn.Module:
    """The model of a Laguna config.json."""
    check_values(config, moe_apply_router_weight_on_input=False, moe_router_logit_softcapping=0)
    if config.values.get("gating", True) not in (True, "per-head", "per-element"):
        raise config.unsupported("gating", "true, per-head and per-element")
    hidden = config.require_int("hidden_size")
    kinds = layer_types(config)
    most, kv_heads, dim = attention_heads(config)
    angles = {kind: rope(config, dim, partial=1.0, layer_type=kind) for kind in {*kinds}}
    counts = config.get_ints("num_attention_heads_per_layer") or (most,) * len(kinds)
    if len(counts) < len(kinds) or any(count < 1 or count % kv_heads for count in counts):
        raise config.error(
            "num_attention_heads_per_layer", f"must be multiples of {kv_heads}, one a layer"
        )

    def routed() -> nn.Module:
        width = config.require_int("shared_expert_intermediate_size", minimum=1)
        return biased_moe(
            config,
            config.require_int("moe_intermediate_size", minimum=1),
            factor=config.get_float("moe_routed_scaling_factor", 1.0),
            shared=GatedMLP(hidden, width),
        )

    def layer(index: int) -> nn.Module:
        kind = kinds[index]
        heads = counts[index], kv_heads, dim
        attention = GatedAttention(config, angles[kind], heads, window(config, kind))
        mlp = routed() if is_routed(config, index, first=1) else dense_mlp(config)
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


FAMILIES = (
    Family(
        "laguna",
        build,
        "heads by layer, sliding windows, rope by layer type, gated attention, sigmoid routing",
        ("poolside/Laguna-XS.2",),
        names=(
            (r"\.mlp\.e_score_correction_bias$", ".mlp.experts.e_score_correction_bias"),
            (r"\.mlp\.shared_experts\.", ".mlp.shared_expert."),
        ),
    ),
)
