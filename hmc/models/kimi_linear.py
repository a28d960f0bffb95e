"""Kimi Linear (arXiv 2510.26692): delta attention with a decay a channel, and every few layers
latent attention that knows no positions; sigmoid routing with a correction bias, shared experts.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import CausalLM, DecoderLayer, MoE, check_values, norm_eps
from hmc.models.converted import converted
from hmc.models.delta import Heads, KimiDeltaNet
from hmc.models.family import W123, Family
from hmc.models.latent import LatentAttention
from hmc.models.routing import dense_mlp, is_routed, routed_experts, shared_experts


def build(config: ModelConfig) -> nn.Module:
    """The model of a Kimi-Linear config.json."""
    check_values(
        config,
        mla_use_nope=True,
        moe_router_activation_func="sigmoid",
        num_expert_group=1,
        topk_group=1,
    )
    hidden = config.require_int("hidden_size")
    settings = config.section("linear_attn_config")
    if settings is None:
        raise config.error("linear_attn_config", "is missing")
    count = settings.require_int("num_heads", minimum=1)
    dim = settings.require_int("head_dim", minimum=1)
    taps = settings.require_int("short_conv_kernel_size", minimum=2)
    heads = Heads(count, count, dim, dim, taps)
    linear, log = _linear_layers(config, settings), not converted(config)

    def layer(index: int) -> nn.Module:
        if index in linear:
            mixer: nn.Module = KimiDeltaNet(hidden, heads, norm_eps(config), low_rank=True, log=log)
        else:
            mixer = LatentAttention(config, None)
        mlp = _moe(config) if is_routed(config, index) else dense_mlp(config)
        return DecoderLayer(config, mixer, mlp)

    return CausalLM(config, layer)


def _linear_layers(config: ModelConfig, settings: ModelConfig) -> frozenset[int]:
    """Layers without attention over all tokens, which the configuration counts from 1."""
    depth = config.require_int("num_hidden_layers")
    linear, full = (
        frozenset(number - 1 for number in settings.get_ints(key))
        for key in ("kda_layers", "full_attn_layers")
    )
    if linear & full or not {*range(depth)} <= linear | full:
        raise settings.error("kda_layers", f"and full_attn_layers must share {depth} layers")
    return linear


def _moe(config: ModelConfig) -> MoE:
    experts, top_k = routed_experts(config, "num_experts", chosen="num_experts_per_token")
    route = Route(
        experts,
        top_k,
        Scoring.SIGMOID,
        normalise=config.get_bool("moe_renormalize", True),
        factor=config.get_float("routed_scaling_factor", 1.0),
        bias_name="gate.e_score_correction_bias",
    )
    return MoE(
        config.require_int("hidden_size"),
        config.require_int("moe_intermediate_size", minimum=1),
        route,
        shared_experts(config, "num_shared_experts"),
    )


FAMILIES = (
    Family(
        "kimi_linear",
        build,
        "delta attention by channels, latent attention without rope, sigmoid routing, shared"
        " experts",
        ("moonshotai/Kimi-Linear-48B-A3B-Instruct", "moonshotai/Kimi-Linear-48B-A3B-Base"),
        names=(
            *W123,
            (r"\.mlp\.(gate|experts|shared_experts)\.", r".block_sparse_moe.\1."),
            (r"\.self_attn\.out_proj\.", ".self_attn.o_proj."),
            (r"\.self_attn\.norm\.", ".self_attn.o_norm."),
        ),
    ),
)
