"""Ling 3: delta attention with a decay a channel, bounded; the last layer of each group has latent
attention whose heads are gated; sigmoid routing in groups, shared experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.blocks import GatedMLP, Linear
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import gated
from hmc.models.common import CausalLM, DecoderLayer, MoE, check_values, norm_eps
from hmc.models.delta import LINEAR, Heads, KimiDeltaNet, kinds_of_layers
from hmc.models.family import Family, look_ahead
from hmc.models.latent import LatentAttention
from hmc.models.rope import Rope, rope
from hmc.models.routing import dense_mlp, grouped_moe, is_routed


class GatedLatentAttention(LatentAttention):
    """What each head mixed is multiplied by the sigmoid of a gate."""

    def __init__(self, config: ModelConfig, angles: Rope) -> None:
        super().__init__(config, angles)
        self.heads, self.v_dim = self.mla.heads, self.mla.v_dim
        self.g_proj = Linear(config.require_int("hidden_size"), self.heads)

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        gate = torch.sigmoid(self.g_proj(x)).unsqueeze(-1)
        return (mixed.reshape(-1, self.heads, self.v_dim) * gate).flatten(-2)


def build(config: ModelConfig) -> nn.Module:
    """The model of a Ling-3 config.json."""
    if "short_conv_kernel_size" not in config:
        raise config.unsupported(
            "short_conv_kernel_size", "Ling 3; Ling and Ring 2.5 and 2.6 have other linear layers"
        )
    check_values(
        config,
        gated_attention_proj_granularity_type="head_wise",
        moe_router_enable_expert_bias=True,
        no_kda_lora=True,
        score_function="sigmoid",
        scoring_func="sigmoid",
        topk_method="noaux_tc",
        use_bias=False,
        use_kda_lora=False,
        use_mla_nope=False,
        use_qkv_bias=False,
    )
    hidden = config.require_int("hidden_size")
    kinds = kinds_of_layers(config, "layer_group_size", 6)
    angles = _rope(config)
    count = config.require_int("num_attention_heads", minimum=1)
    dim = config.require_int("head_dim", minimum=1)
    heads = Heads(count, count, dim, dim, config.require_int("short_conv_kernel_size", minimum=2))
    bounded = config.get_bool("kda_safe_gate", True)
    lower = config.get_float("kda_lower_bound", -5.0) if bounded else None
    bounds, shared_bounds = (
        _limits(config, f"{name}_swiglu_limit_list") for name in ("expert", "share_expert")
    )

    def layer(index: int) -> nn.Module:
        if kinds[index] == LINEAR:
            mixer: nn.Module = KimiDeltaNet(
                hidden, heads, norm_eps(config), low_rank=False, lower=lower
            )
        else:
            mixer = GatedLatentAttention(config, angles)
        if not is_routed(config, index, 2):
            return DecoderLayer(config, mixer, dense_mlp(config))
        return DecoderLayer(config, mixer, _moe(config, bounds[index], shared_bounds[index]))

    return CausalLM(config, layer)


def _moe(config: ModelConfig, bound: float, shared_bound: float) -> MoE:
    moe = grouped_moe(config, factor=2.5)
    moe.experts.act = _act(bound)
    if count := config.get_int("num_shared_experts", 0):
        width = config.require_int("moe_intermediate_size")
        width = config.get_int("moe_shared_expert_intermediate_size", width, minimum=1)
        hidden = config.require_int("hidden_size")
        moe.shared_experts = GatedMLP(hidden, count * width, act=_act(shared_bound))
    return moe


def _rope(config: ModelConfig) -> Rope:
    """The rotated part of each head is rotated as a whole, whatever partial_rotary_factor says."""
    key = "partial_rotary_factor"
    sections = ((name, config.section(name)) for name in ("rope_scaling", "rope_parameters"))
    whole = {name: {**each.values, key: 1.0} for name, each in sections if each and each.values}
    text = config.with_text(**whole, **{key: 1.0})
    return rope(text, config.require_int("qk_rope_head_dim", minimum=2))


def _act(limit: float) -> str:
    return gated("silu(gate)", limit=limit, after=True) if limit else ""


def _limits(config: ModelConfig, key: str) -> tuple[float, ...]:
    """Bounds of activations by layer, 0 where there is none."""
    depth, found = config.require_int("num_hidden_layers"), config.values.get(key)
    if found is None:
        return (0.0,) * depth
    right = isinstance(found, list) and all(type(each or 0) in (int, float) for each in found)
    if not right or len(found) < depth:
        raise config.error(key, f"must be a number for each of {depth} layers")
    return tuple(float(each or 0) for each in found)


FAMILIES = (
    Family(
        "bailing_hybrid",
        build,
        "delta attention by channels, latent attention with gated heads, sigmoid routing in"
        " groups, shared experts",
        ("inclusionAI/Ling-3.0-flash", "inclusionAI/Ling-3.0-tiny"),
        names=(
            (r"^model\.embed_tokens\.", "model.word_embeddings."),
            (r"\.self_attn\.o_proj\.", ".attention.dense."),
            (r"\.self_attn\.out_proj\.", ".attention.o_proj."),
            (r"\.self_attn\.norm\.", ".attention.o_norm."),
            (r"\.self_attn\.", ".attention."),
            (r"\.mlp\.gate\.e_score_correction_bias$", ".mlp.gate.expert_bias"),
        ),
        aside=look_ahead,
    ),
)
