"""A.X-K1: DeepSeek-V3 with a norm of what comes out of each routed MLP."""

from __future__ import annotations

from torch import nn

from hmc.checkpoint.config import ModelConfig
from hmc.models.common import Norms
from hmc.models.deepseek_v3 import latent_model
from hmc.models.family import Aside, Family, look_ahead
from hmc.models.routing import is_routed


def build(config: ModelConfig) -> nn.Module:
    """The model of an A.X-K1 config.json."""
    config.require_int("n_group")
    config.require_int("topk_group")
    return latent_model(config, Norms(mlp_out="post_mlp_layernorm"))


def aside(config: ModelConfig) -> tuple[Aside, ...]:
    """Checkpoints have the norm for layers that are not routed, too."""
    layers = range(config.require_int("num_hidden_layers"))
    dense = [index for index in layers if not is_routed(config, index)]
    unused = [
        Aside(f"model.layers.{index}.post_mlp_layernorm.weight", "dense layers do not use it")
        for index in dense
    ]
    return *unused, *look_ahead(config)


FAMILIES = (
    Family(
        "axk1",
        build,
        "latent attention, sigmoid routing in groups, shared experts, norms after routed MLPs",
        ("skt/A.X-K1",),
        aside=aside,
    ),
)
