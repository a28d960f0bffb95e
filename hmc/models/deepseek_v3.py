"""DeepSeek-V3 (arXiv 2412.19437): latent attention; sigmoid routing in groups with a correction
bias; shared experts. Families that are built alike differ in what their rows say.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import PRE_NORM, CausalLM, DecoderLayer, Norms, check_values
from hmc.models.family import NO_IMAGES, Aside, Family, look_ahead
from hmc.models.latent import Indexer, LatentAttention
from hmc.models.rope import Rope, rope
from hmc.models.routing import dense_mlp, grouped_moe, is_routed


def build(config: ModelConfig) -> nn.Module:
    """The model of a DeepSeek-V3 config.json."""
    config.require_int("n_group")
    config.require_int("topk_group")
    return latent_model(config)


def latent_model(
    config: ModelConfig,
    routed_norms: Norms = PRE_NORM,
    indexer: Callable[[Rope, int], Indexer] | None = None,
) -> nn.Module:
    """Latent attention and routing in groups; `routed_norms` are those of routed layers, `indexer`
    makes the one of a layer, if any.
    """
    check_values(config, scoring_func="sigmoid", topk_method="noaux_tc")
    angles = rope(config, config.require_int("qk_rope_head_dim", minimum=2))

    def layer(index: int) -> nn.Module:
        chooses = indexer(angles, index) if indexer else None
        attention = LatentAttention(config, angles, indexer=chooses)
        if is_routed(config, index):
            return DecoderLayer(config, attention, grouped_moe(config), routed_norms)
        return DecoderLayer(config, attention, dense_mlp(config))

    return CausalLM(config, layer)


def _vision(config: ModelConfig) -> tuple[Aside, ...]:
    towers = (Aside(f"{name}.*", NO_IMAGES) for name in ("vision_tower", "mm_projector"))
    return *towers, *look_ahead(config)


_NEEDS = "latent attention, sigmoid routing in groups, shared experts"

FAMILIES = (
    Family(
        "deepseek_v3",
        build,
        _NEEDS,
        ("deepseek-ai/DeepSeek-V3", "deepseek-ai/DeepSeek-R1", "deepseek-ai/DeepSeek-V3.1"),
        aside=look_ahead,
    ),
    Family("kimi_k2", build, _NEEDS, ("moonshotai/Kimi-K2-Instruct",), aside=look_ahead),
    Family(
        "kimi_k25",
        build,
        f"{_NEEDS}; text alone",
        ("moonshotai/Kimi-K2.5",),
        names=((r"^", "language_model."),),
        aside=_vision,
    ),
    Family(
        "glm4_moe_lite",
        latent_model,
        _NEEDS,
        ("zai-org/GLM-4.7-Flash",),
        aside=look_ahead,
    ),
)
