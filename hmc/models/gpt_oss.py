"""gpt-oss: grouped-query attention with biases and sinks, within a window in every other layer;
experts with biases, chosen by logits with biases, whose gate and up are bounded.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import gated
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    MoE,
    attention_heads,
)
from hmc.models.family import Family
from hmc.models.rope import rope
from hmc.models.routing import routed_experts
from hmc.models.stacks import Stacks, stacked
from hmc.models.windows import layer_types, window


def build(config: ModelConfig) -> nn.Module:
    """The model of a gpt-oss config.json."""
    hidden = config.require_int("hidden_size")
    width = config.require_int("intermediate_size", minimum=1)
    bias = config.get_bool("attention_bias", True)
    kinds = layer_types(config, every=2)
    angles = rope(config, attention_heads(config)[2], 150_000.0)
    experts, top_k = routed_experts(config, "num_local_experts", "num_experts")
    alpha = config.get_float("swiglu_alpha", 1.702)
    limit = config.get_float("swiglu_limit", 7.0)

    def layer(index: int) -> nn.Module:
        attention = GroupedQueryAttention(
            config,
            angles,
            bias=bias,
            out_bias=bias,
            window=window(config, kinds[index]),
            sinks="sinks",
        )
        mlp = MoE(
            hidden,
            width,
            Route(experts, top_k, Scoring.SOFTMAX_CHOSEN, normalise=False),
            act=gated(f"gate * sigmoid({alpha!r} * gate)", limit=limit, plus=1.0),
            stacked=_stacks(config, experts, hidden, width),
            bias=True,
        )
        return DecoderLayer(config, attention, mlp)

    return CausalLM(config, layer)


_TRANSPOSED = {"": True, "mxfp4": False}
"""By `quant_method`, whether stacks lie by columns: those in BF16, as transformers writes them, and
not the published ones."""


def _stacks(config: ModelConfig, experts: int, hidden: int, width: int) -> Stacks | None:
    """Where experts lie; with other methods, and in GGUF files, each one's matrices are apart."""
    section = config.section("quantization_config")
    method = section.get_str("quant_method", "") if section is not None else ""
    if method not in _TRANSPOSED:
        return None
    transposed = _TRANSPOSED[method]
    return stacked(experts, hidden, width, interleaved=True, transposed=transposed, bias=True)


FAMILIES = (
    Family(
        "gpt_oss",
        build,
        "sliding windows, sinks, biases of attention, router and experts, stacked experts with"
        " bounded activations",
        ("openai/gpt-oss-20b", "openai/gpt-oss-120b"),
        names=((r"\.mlp\.gate\.", ".mlp.router."),),
    ),
)
