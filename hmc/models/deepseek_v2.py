"""DeepSeek-V2 (arXiv 2405.04434) and V2-Lite: latent attention; softmax routing, in V2 within the
groups that have the best experts, whose weights are scaled, not renormalised; shared experts.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import CausalLM, DecoderLayer, MoE, check_values
from hmc.models.family import Family
from hmc.models.latent import LatentAttention
from hmc.models.rope import rope
from hmc.models.routing import dense_mlp, expert_groups, is_routed, routed_experts, shared_experts


def build(config: ModelConfig) -> nn.Module:
    """The model of a DeepSeek-V2 config.json."""
    check_values(config, scoring_func="softmax", norm_topk_prob=False)
    angles = rope(config, config.require_int("qk_rope_head_dim", minimum=2))

    def layer(index: int) -> nn.Module:
        mlp = _routed(config) if is_routed(config, index) else dense_mlp(config)
        return DecoderLayer(config, LatentAttention(config, angles), mlp)

    return CausalLM(config, layer)


def _routed(config: ModelConfig) -> MoE:
    experts, top_k = routed_experts(config, "n_routed_experts")
    limited = config.get_str("topk_method", "greedy") == "group_limited_greedy"
    if not limited:
        check_values(config, topk_method="greedy")
    groups, top_groups = expert_groups(config, experts, top_k) if limited else (0, 0)
    factor = config.get_float("routed_scaling_factor", 1.0)
    return MoE(
        config.require_int("hidden_size"),
        config.require_int("moe_intermediate_size", minimum=1),
        Route(
            experts,
            top_k,
            Scoring.SOFTMAX_ALL,
            normalise=False,
            groups=groups,
            top_groups=top_groups,
            group_best=1,
            factor=factor,
        ),
        shared_experts(config, "n_shared_experts"),
    )


FAMILIES = (
    Family(
        "deepseek_v2",
        build,
        "latent attention, softmax routing, shared experts",
        (
            "deepseek-ai/DeepSeek-V2",
            "deepseek-ai/DeepSeek-V2-Lite",
            "deepseek-ai/DeepSeek-Coder-V2-Lite-Instruct",
        ),
    ),
)
