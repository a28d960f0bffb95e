"""Nemotron-H and Nemotron 3: each layer is one half alone, behind a norm: Mamba 2, attention
without rope, routed experts, or an MLP. Neither experts nor MLPs have gates, and experts may read
and write a narrower row than the model's.
"""

from __future__ import annotations

from torch import Tensor, nn

from hmc.blocks import MLP, Linear, Route, Scoring
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import unary
from hmc.models.common import (
    CausalLM,
    GroupedQueryAttention,
    MoE,
    check_values,
    check_window,
    hidden_norm,
)
from hmc.models.family import LOOKS_AHEAD, Aside, Family, look_ahead
from hmc.models.mamba2 import Mamba2, Sizes
from hmc.models.routing import expert_groups, routed_experts

_KINDS = {
    **dict.fromkeys(("M", "mamba", "linear_attention"), "mamba"),
    **dict.fromkeys(("*", "attention", "full_attention"), "attention"),
    **dict.fromkeys(("E", "moe"), "moe"),
    **dict.fromkeys(("-", "mlp"), "mlp"),
}
"""What configurations call the kinds of layers."""


def build(config: ModelConfig) -> nn.Module:
    """The model of a Nemotron-H config.json."""
    kinds = layer_kinds(config)
    return CausalLM(config, lambda index: Layer(config, kinds[index]))


def layer_kinds(config: ModelConfig) -> tuple[str, ...]:
    """mamba, attention, moe or mlp for each layer."""
    key = "layers_block_type" if "layers_block_type" in config else "hybrid_override_pattern"
    words = config.get_strs(key) if key == "layers_block_type" else config.require_str(key)
    if len(words) < config.depth or {*words} - {*_KINDS}:
        raise config.error(
            key, f"must say mamba, attention, moe or mlp (M*E-) for each of {config.depth} layers"
        )
    return tuple(_KINDS[word] for word in words)


class Layer(nn.Module):
    """h + mixer(norm(h))."""

    def __init__(self, config: ModelConfig, kind: str) -> None:
        super().__init__()
        self.mixes = kind in ("mamba", "attention")
        self.norm = hidden_norm(config)
        self.mixer = _MIXERS[kind](config)

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half: all of it, or none."""
        return (self.norm, self.mixer) if self.mixes else ()

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self.norm(h)
        return h + (self.mixer(x, positions) if self.mixes else self.mixer(x))  # type: ignore[no-any-return]


class LatentMoE(MoE):
    """Experts between two projections, where the configuration has `moe_latent_size`: the shared
    one and the router read what comes before the first.
    """

    def __init__(self, config: ModelConfig) -> None:
        experts, top_k = routed_experts(config, "n_routed_experts")
        groups, top_groups = expert_groups(config, experts, top_k)
        hidden = config.require_int("hidden_size")
        latent = config.get_int("moe_latent_size", 0)
        act, bias = unary(config, "up", "mlp_hidden_act"), config.get_bool("mlp_bias", False)
        route = Route(
            experts,
            top_k,
            Scoring.SIGMOID,
            normalise=config.get_bool("norm_topk_prob", True),
            groups=groups,
            top_groups=top_groups,
            factor=config.get_float("routed_scaling_factor", 1.0),
            bias_name="gate.e_score_correction_bias",
        )
        super().__init__(
            latent or hidden,
            config.require_int("moe_intermediate_size", minimum=1),
            route,
            MLP(hidden, _shared(config), act, bias=bias),
            act=act,
        )
        self.gate = Linear(hidden, experts)
        self.fc1_latent_proj = Linear(hidden, latent, bias=bias) if latent else None
        self.fc2_latent_proj = Linear(latent, hidden, bias=bias) if latent else None

    def forward(self, x: Tensor) -> Tensor:
        if self.fc1_latent_proj is None or self.fc2_latent_proj is None:
            return super().forward(x)
        routed = self.experts(self.fc1_latent_proj(x), self.route(self.gate(x)))
        return self.fc2_latent_proj(routed) + self.shared_experts(x)  # type: ignore[no-any-return, misc]


def _shared(config: ModelConfig) -> int:
    check_values(config, n_shared_experts=1)
    return config.require_int("moe_shared_expert_intermediate_size", minimum=1)


def _mamba(config: ModelConfig) -> nn.Module:
    keys = ("mamba_num_heads", "mamba_head_dim", "n_groups", "ssm_state_size", "conv_kernel")
    return Mamba2(
        config,
        Sizes.of(config, *keys),
        act=unary(config, key="mamba_hidden_act"),
        bias=config.get_bool("use_bias", False),
        conv_bias=config.get_bool("use_conv_bias", True),
    )


def _attention(config: ModelConfig) -> nn.Module:
    check_window(config)
    bias = config.get_bool("attention_bias", False)
    return GroupedQueryAttention(config, None, bias=bias, out_bias=bias)


def _mlp(config: ModelConfig) -> nn.Module:
    hidden, width = (
        config.require_int(key, minimum=1) for key in ("hidden_size", "intermediate_size")
    )
    bias = config.get_bool("mlp_bias", False)
    return MLP(hidden, width, unary(config, "up", "mlp_hidden_act"), bias=bias)


_MIXERS = {"mamba": _mamba, "attention": _attention, "moe": LatentMoE, "mlp": _mlp}


def _ahead(config: ModelConfig) -> tuple[Aside, ...]:
    later = look_ahead(config)
    return (Aside("mtp.*", LOOKS_AHEAD), *later) if later else ()


FAMILIES = (
    Family(
        "nemotron_h",
        build,
        "Mamba 2, layers without rope, layers of one half, experts and MLPs without gates (relu^2),"
        " experts between two projections, sigmoid routing with a selection bias",
        (
            "nvidia/NVIDIA-Nemotron-3-Nano-30B-A3B-BF16",
            "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-FP8",
            "nvidia/NVIDIA-Nemotron-3-Ultra-550B-A55B-BF16",
        ),
        names=(
            (r"^model\.embed_tokens\.", "backbone.embeddings."),
            (r"^model\.norm\.", "backbone.norm_f."),
            (r"^model\.", "backbone."),
        ),
        aside=_ahead,
    ),
)
