"""Mistral Small 4 (Mistral 4): latent attention whose queries grow with their position; softmax
routing, in groups where the configuration has some; shared experts; stacked experts.
"""

from __future__ import annotations

from torch import nn

from hmc.blocks import Growth, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import CausalLM, DecoderLayer, MoE
from hmc.models.family import NO_IMAGES, Aside, Family
from hmc.models.latent import LatentAttention
from hmc.models.rope import Rope, rope
from hmc.models.routing import (
    dense_mlp,
    expert_groups,
    is_routed,
    routed_experts,
    shared_experts,
)
from hmc.models.stacks import stacked


def build(config: ModelConfig) -> nn.Module:
    """The model of a Mistral 4 config.json, or of the text part of one of model_type mistral3."""
    if config.get_str("model_type", "") != "mistral4":
        raise config.unsupported("model_type", "mistral4")
    angles, growth = _rope(config), _growth(config)

    def layer(index: int) -> nn.Module:
        if is_routed(config, index):
            normalise = config.get_bool("norm_topk_prob", True)
            mlp: nn.Module = routed_mlp(config, normalise=normalise, stacks=True)
        else:
            mlp = dense_mlp(config)
        return DecoderLayer(config, LatentAttention(config, angles, growth), mlp)

    return CausalLM(config, layer)


def _rope(config: ModelConfig) -> Rope:
    """`partial_rotary_factor` is a share of whole query heads."""
    rotated = config.require_int("qk_rope_head_dim", minimum=2)
    dim = rotated + config.require_int("qk_nope_head_dim", minimum=1)
    angles = rope(config, dim, partial=rotated / dim)
    if (found := 2 * len(angles.inv_freq)) != rotated:
        wanted = f"is {rotated}, but partial_rotary_factor turns {found} elements a head"
        raise config.error("qk_rope_head_dim", wanted)
    return angles


def _growth(config: ModelConfig) -> Growth | None:
    section = config.section("rope_parameters")
    by = section.get_float("llama_4_scaling_beta", 0.0) if section else 0.0
    if section is None or not by:
        return None
    return Growth(by, section.require_int("original_max_position_embeddings", minimum=1))


def routed_mlp(config: ModelConfig, *, normalise: bool, stacks: bool = False) -> MoE:
    """Softmax over all experts, of groups where there are some; the chosen renormalised where it is
    said; shared experts. Experts lie in `stacks` by rows or one by one.
    """
    experts, top_k = routed_experts(config, "n_routed_experts", "num_local_experts")
    groups, top_groups = expert_groups(config, experts, top_k)
    route = Route(
        experts,
        top_k,
        Scoring.SOFTMAX_ALL,
        normalise=normalise,
        groups=groups,
        top_groups=top_groups,
        factor=config.get_float("routed_scaling_factor", 1.0),
    )
    hidden, width = (
        config.require_int(key, minimum=1) for key in ("hidden_size", "moe_intermediate_size")
    )
    shared = shared_experts(config, "n_shared_experts")
    return MoE(
        hidden, width, route, shared, stacked=stacked(experts, hidden, width) if stacks else None
    )


_NEEDS = "latent attention with growing queries, softmax routing in groups, shared experts"


def _vision(config: ModelConfig) -> tuple[Aside, ...]:
    names = ("vision_tower", "multi_modal_projector")
    return tuple(Aside(f"{name}.*", NO_IMAGES) for name in names)


FAMILIES = (
    Family("mistral4", build, _NEEDS),
    Family(
        "mistral3",
        build,
        f"{_NEEDS}; text alone, of Mistral 4",
        ("mistralai/Mistral-Small-4-119B-2603",),
        names=((r"^", "language_model."),),
        aside=_vision,
    ),
)
