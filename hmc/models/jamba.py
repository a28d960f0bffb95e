"""Jamba: most layers mix tokens by the scan of Mamba instead of attention, which has no rotary
embedding; every other MLP is routed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks import Conv, Linear, RMSNorm, SelectiveScan, Vector
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import unary
from hmc.models.common import (
    CausalLM,
    DecoderLayer,
    GroupedQueryAttention,
    Norms,
    check_values,
    check_window,
    norm_eps,
)
from hmc.models.converted import converted
from hmc.models.family import Family
from hmc.models.routing import dense_mlp, softmax_moe


class Mamba(nn.Module):
    """Mamba (arXiv 2312.00752, figure 3) with norms of dt, b and c: [T, hidden] -> [T, hidden]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, bias = config.require_int("hidden_size"), config.get_bool("mamba_proj_bias", False)
        self.width = config.get_int("mamba_expand", 2, minimum=1) * hidden
        self.states = config.get_int("mamba_d_state", 16, minimum=1)
        self.rank = _rank(config)
        self.in_proj = Linear(hidden, 2 * self.width, bias=bias)
        self.conv1d = Conv(
            self.width,
            config.get_int("mamba_d_conv", 4, minimum=2),
            act=unary(config),
            bias=config.get_bool("mamba_conv_bias", True),
        )
        self.x_proj = Linear(self.width, self.rank + 2 * self.states)
        self.dt_proj = Linear(self.rank, self.width, bias=True)
        eps = norm_eps(config)
        self.dt_layernorm = RMSNorm(self.rank, eps)
        self.b_layernorm, self.c_layernorm = (RMSNorm(self.states, eps) for _ in range(2))
        self.scan = SelectiveScan(self.width, self.states, log=not converted(config))
        self.D = Vector(self.width)
        self.out_proj = Linear(self.width, hidden, bias=bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        both, rank, last = self.in_proj(x), self.rank, self.rank + self.states
        gate, x = both[..., self.width :], self.conv1d(both[..., : self.width])
        every = self.x_proj(x)
        dt = functional.softplus(self.dt_proj(self.dt_layernorm(every[..., :rank])))
        b, c = self.b_layernorm(every[..., rank:last]), self.c_layernorm(every[..., last:])
        y = self.scan(x, dt, b, c) + x * self.D()
        return self.out_proj(y * functional.silu(gate))  # type: ignore[no-any-return]


def _rank(config: ModelConfig) -> int:
    """Elements that the steps of all columns are made from."""
    if config.values.get("mamba_dt_rank", "auto") == "auto":
        return -(-config.require_int("hidden_size") // 16)
    return config.get_int("mamba_dt_rank", 0, minimum=1)


def build(config: ModelConfig) -> nn.Module:
    """The model of a Jamba config.json."""
    check_values(config, mamba_inner_layernorms=True)
    check_window(config)
    experts = config.get_int("num_experts", 16, minimum=1)
    attends = _every(config, "attn_layer", 8, 4)
    routed = _every(config, "expert_layer", 2, 1)

    def layer(index: int) -> nn.Module:
        mixer = GroupedQueryAttention(config, None) if attends(index) else Mamba(config)
        moe = experts > 1 and routed(index)
        mlp = softmax_moe(config, "intermediate_size") if moe else dense_mlp(config)
        return DecoderLayer(config, mixer, mlp, Norms("input_layernorm", "", "pre_ff_layernorm"))

    return CausalLM(config, layer)


def _every(config: ModelConfig, kind: str, period: int, offset: int) -> Callable[[int], bool]:
    """Which layers are of a kind: one of so many."""
    period = config.get_int(f"{kind}_period", period, minimum=1)
    offset = config.get_int(f"{kind}_offset", offset)
    if offset >= period:
        raise config.error(f"{kind}_offset", f"is {offset}, must be below the period of {period}")
    return lambda index: index % period == offset


FAMILIES = (
    Family(
        "jamba",
        build,
        "selective scans (Mamba) in most layers, attention without rotary embedding",
        ("ai21labs/AI21-Jamba-1.5-Mini", "ai21labs/AI21-Jamba-1.5-Large"),
        names=(
            (r"\.self_attn\.(?![qkvo]_proj)", ".mamba."),
            (r"^model\.norm\.", "model.final_layernorm."),
            (r"\.mlp\.gate\.", ".mlp.router."),
            (r"\.mlp\.", ".feed_forward."),
        ),
    ),
)
