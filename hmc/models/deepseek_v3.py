"""DeepSeek-V3 (arXiv 2412.19437): latent attention; sigmoid routing in groups with a correction
bias; shared experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import (
    MLA,
    Columns,
    GatedMLP,
    Linear,
    RMSNorm,
    Rotary,
    Route,
    Scoring,
)
from hmc.checkpoint.config import ModelConfig
from hmc.errors import UnsupportedError
from hmc.models.common import CausalLM, DecoderLayer, MoE, routed_experts
from hmc.models.rope import Rope, rope

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms: a constant of the architecture, whatever `rms_norm_eps` says."""


def build(config: ModelConfig) -> nn.Module:
    """The model of a DeepSeek-V3 config.json."""
    for key, known in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
        if (value := config.get_str(key, known)) != known:
            raise UnsupportedError(
                f"{config.path}: {key} {value!r} is not {known!r}, the one hmc knows"
            )
    hidden = config.require_int("hidden_size")
    angles = rope(config, config.require_int("qk_rope_head_dim", minimum=2))
    first_routed = config.get_int("first_k_dense_replace", 0)
    every = config.get_int("moe_layer_freq", 1, minimum=1)

    def layer(index: int) -> nn.Module:
        mlp = (
            _routed(config)
            if index >= first_routed and index % every == 0
            else GatedMLP(hidden, config.require_int("intermediate_size", minimum=1))
        )
        return DecoderLayer(config, LatentAttention(config, angles), mlp)

    return CausalLM(config, layer)


def tolerated(config: ModelConfig) -> tuple[str, ...]:
    """The layers after the last, which predict tokens further ahead and which hmc does not run."""
    layers = config.require_int("num_hidden_layers")
    extra = config.get_int("num_nextn_predict_layers", 0)
    return tuple(f"model.layers.{layers + index}.*" for index in range(extra))


class LatentAttention(nn.Module):
    """Projections and norms around `MLA`; the query comes through a latent of its own where the
    config has one.
    """

    def __init__(self, config: ModelConfig, rope: Rope) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        heads = config.require_int("num_attention_heads", minimum=1)
        nope = config.require_int("qk_nope_head_dim", minimum=1)
        rotated = config.require_int("qk_rope_head_dim", minimum=2)
        v_dim = config.require_int("v_head_dim", minimum=1)
        rank = config.require_int("kv_lora_rank", minimum=1)
        q_rank = config.get_int("q_lora_rank", 0)
        bias = config.get_bool("attention_bias", False)
        width = heads * (nope + rotated)
        if q_rank:
            self.q_a_proj = Linear(hidden, q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, LATENT_EPS)
            self.q_b_proj = Linear(q_rank, width)
        else:
            self.q_proj = Linear(hidden, width)
        self.q_rank = q_rank
        self.kv_a_proj_with_mqa = Linear(hidden, rank + rotated, bias=bias)
        self.latent = Columns(0, 0, rank)
        self.k_rope = Columns(1, rank, rotated)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_EPS)
        pairs = config.get_bool("rope_interleave", True)
        self.q_rotary = Rotary(
            heads,
            nope + rotated,
            rope.inv_freq,
            start=nope,
            interleaved=pairs,
            factor=rope.factor,
        )
        self.k_rotary = Rotary(1, rotated, rope.inv_freq, interleaved=pairs, factor=rope.factor)
        scale = (nope + rotated) ** -0.5 * rope.mscale**2
        self.mla = MLA(heads, nope, rotated, v_dim, rank, scale)
        self.o_proj = Linear(heads * v_dim, hidden, bias=bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.q_rank:
            q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(x)))
        else:
            q = self.q_proj(x)
        compressed = self.kv_a_proj_with_mqa(x)
        latent = self.kv_a_layernorm(self.latent(compressed))
        k_rope = self.k_rotary(self.k_rope(compressed), positions)
        return self.o_proj(self.mla(self.q_rotary(q, positions), latent, k_rope))  # type: ignore[no-any-return]


def _routed(config: ModelConfig) -> MoE:
    experts, top_k = routed_experts(config, "n_routed_experts", "num_local_experts")
    groups, top_groups = _groups(config, experts, top_k)
    route = Route(
        experts,
        top_k,
        Scoring.SIGMOID,
        normalise=config.get_bool("norm_topk_prob", True),
        groups=groups,
        top_groups=top_groups,
        factor=config.require_float("routed_scaling_factor"),
        bias_name="gate.e_score_correction_bias",
    )
    return MoE(
        config.require_int("hidden_size"),
        config.require_int("moe_intermediate_size", minimum=1),
        route,
        shared=config.get_int("n_shared_experts", 0),
    )


def _groups(config: ModelConfig, experts: int, top_k: int) -> tuple[int, int]:
    """(groups, groups a token may use), both 0 where every group is open anyway."""
    groups = config.require_int("n_group", minimum=1)
    top_groups = config.require_int("topk_group", minimum=1)
    if experts % groups or experts // groups < 2:
        raise config.error("n_group", f"is {groups}: {experts} experts make no such groups of 2+")
    if top_groups > groups:
        raise config.error("topk_group", f"is {top_groups}, more than the {groups} groups")
    if top_groups * (experts // groups) < top_k:
        raise config.error("topk_group", f"is {top_groups}: too few experts to choose {top_k}")
    return (0, 0) if top_groups == groups else (groups, top_groups)
