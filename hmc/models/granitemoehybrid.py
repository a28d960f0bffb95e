"""Granite 4 with Mamba 2 layers among those that attend, with positions or without; in every layer
experts beside an MLP for all tokens, or that MLP alone, scaled as in Granite MoE.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import GatedMLP
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import unary
from hmc.models.common import attention_heads
from hmc.models.family import Family
from hmc.models.granitemoe import (
    NAMES,
    SCALES,
    ScaledLayer,
    SharedMLP,
    attention,
    routed,
    scaled_model,
)
from hmc.models.mamba2 import Mamba2, Sizes
from hmc.models.rope import rope
from hmc.models.stacks import lie_apart

_MIXERS = {
    "mamba": True,
    "linear_attention": True,
    "attention": False,
    "full_attention": False,
}
"""Types of layers: whether they are Mamba's."""


def build(config: ModelConfig) -> nn.Module:
    """The model of a Granite 4 hybrid config.json."""
    mamba = _mamba(config)
    angles = rope(config, attention_heads(config)[2])
    turned = config.get_str("position_embedding_type", "nope") == "rope"
    shared = config.require_int("shared_intermediate_size")
    dense = config.require_int("num_local_experts") == 0

    def layer(index: int) -> nn.Module:
        mixer = _mixer(config) if mamba[index] else attention(config, angles if turned else None)
        mlp = Dense(config, shared) if dense else routed(config, shared)
        return ScaledLayer(config, mixer, mlp)

    return scaled_model(config, layer)


class Dense(nn.Module):
    """The MLP for all tokens without experts beside it."""

    def __init__(self, config: ModelConfig, width: int) -> None:
        super().__init__()
        mlp = GatedMLP if lie_apart(config) else SharedMLP
        self.shared_experts = mlp(config.require_int("hidden_size"), width)

    def forward(self, x: Tensor) -> Tensor:
        return self.shared_experts(x)  # type: ignore[no-any-return]


def _mamba(config: ModelConfig) -> tuple[bool, ...]:
    """Whether each layer is Mamba's."""
    depth = config.require_int("num_hidden_layers", minimum=1)
    kinds = config.get_strs("layer_types") or ("mamba",) * depth
    if len(kinds) < depth or {*kinds} - {*_MIXERS}:
        raise config.error("layer_types", f"must say mamba or attention for each of {depth} layers")
    return tuple(_MIXERS[kind] for kind in kinds)


def _mixer(config: ModelConfig) -> Mamba2:
    inner = config.get_int("mamba_expand", 2, minimum=1) * config.require_int("hidden_size")
    heads = config.require_int("mamba_n_heads", minimum=1)
    if config.values.get("mamba_d_head", "auto") == "auto":
        config = config.with_text(mamba_d_head=inner // heads)
    keys = ("mamba_n_heads", "mamba_d_head", "mamba_n_groups", "mamba_d_state", "mamba_d_conv")
    sizes = Sizes.of(config, *keys)
    if sizes.heads * sizes.head_dim != inner:
        raise config.error(
            "mamba_d_head", f"is {sizes.head_dim}: {heads} heads are to have {inner} elements"
        )
    return Mamba2(
        config,
        sizes,
        act=unary(config),
        bias=config.get_bool("mamba_proj_bias", False),
        conv_bias=config.get_bool("mamba_conv_bias", True),
    )


FAMILIES = (
    Family(
        "granitemoehybrid",
        build,
        f"Mamba 2, layers without rope, a shared expert, {SCALES}",
        ("ibm-granite/granite-4.0-h-tiny", "ibm-granite/granite-4.0-h-small"),
        names=(
            *NAMES,
            (r"\.self_attn\.(in_proj|conv1d|A_log|D|dt_bias|norm|out_proj)\b", r".mamba.\1"),
        ),
    ),
)
