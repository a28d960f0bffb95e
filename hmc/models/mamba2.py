"""Mamba 2 (Dao and Gu, arXiv 2405.21060): a short convolution, linear attention whose decay a step
of each head decides, what skips it, and a gated norm.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks import Conv, Linear, LinearAttention, Vector
from hmc.checkpoint.config import ModelConfig
from hmc.models.common import norm_eps
from hmc.models.converted import converted, rates

_LARGEST = 3.4e38
"""Limits of steps beyond it are none."""


@dataclass(frozen=True)
class Sizes:
    """Heads and elements of each; groups of heads that share keys and queries, and the elements of
    these (the state's); taps of the convolution.
    """

    heads: int
    head_dim: int
    groups: int
    states: int
    taps: int

    @staticmethod
    def of(config: ModelConfig, heads: str, dim: str, groups: str, states: str, taps: str) -> Sizes:
        """Those that a configuration has under these keys."""
        keys = (heads, dim, groups, states, taps)
        found = Sizes(*(config.require_int(key, minimum=1) for key in keys))
        if found.heads % found.groups:
            raise config.error(groups, f"is {found.groups}, must divide the {found.heads} heads")
        if found.taps < 2:
            raise config.error(taps, f"is {found.taps}, must be 2 or more")
        return found


class Mamba2(nn.Module):
    """x [T, hidden] -> [T, hidden]; positions are not read.

    Steps are kept within what `time_step_limit` says. `act` is an expression of x that follows the
    convolution, `conv_bias` whether that has a bias, `bias` whether both projections have one.
    """

    def __init__(
        self, config: ModelConfig, sizes: Sizes, *, act: str, bias: bool, conv_bias: bool
    ) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size", minimum=1)
        self.sizes, self.limits, self.log = sizes, _limits(config), not converted(config)
        self.inner = sizes.heads * sizes.head_dim
        self.keys = sizes.groups * sizes.states
        mixed = self.inner + 2 * self.keys
        self.in_proj = Linear(hidden, self.inner + mixed + sizes.heads, bias=bias)
        self.conv1d = Conv(mixed, sizes.taps, act=act, bias=conv_bias)
        self.A_log, self.D, self.dt_bias = (Vector(sizes.heads) for _ in range(3))
        self.attention = LinearAttention(
            sizes.heads, sizes.groups, sizes.states, sizes.head_dim, 1.0, delta=False
        )
        self.norm = GatedNorm(self.inner, norm_eps(config), sizes.groups)
        self.out_proj = Linear(self.inner, hidden, bias=bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        inner, keys, heads = self.inner, self.keys, self.sizes.heads
        every = self.in_proj(x)
        gate, mixed, dt = every[:, :inner], every[:, inner:-heads], every[:, -heads:]
        mixed = self.conv1d(mixed)
        v, k, q = mixed[:, :inner], mixed[:, inner : inner + keys], mixed[:, inner + keys :]
        step = functional.softplus(dt + self.dt_bias())
        least, most = self.limits
        if (least, most) != (0.0, None):
            step = step.clamp(least, most)
        decay = torch.exp(rates(self.A_log(), self.log) * step)
        fed = self._by_head(v) * step.unsqueeze(-1)
        y = self.attention(q, k, fed.flatten(-2), decay)
        y = self._by_head(y) + self._by_head(v) * self.D().unsqueeze(-1)
        return self.out_proj(self.norm(y.flatten(-2), gate))  # type: ignore[no-any-return]

    def _by_head(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.sizes.heads, self.sizes.head_dim))  # type: ignore[no-untyped-call, no-any-return]


class GatedNorm(nn.Module):
    """Rows [T, size] times silu(gate), each of `groups` chunks at a mean square of 1, times a
    weight [size].
    """

    def __init__(self, size: int, eps: float, groups: int) -> None:
        super().__init__()
        self.eps, self.groups = eps, groups
        self.weight = Vector(size)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        x = x * functional.silu(gate)
        x = x.unflatten(-1, (self.groups, -1))  # type: ignore[no-untyped-call]
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps)
        return x.flatten(-2) * self.weight()  # type: ignore[no-any-return]


def _limits(config: ModelConfig) -> tuple[float, float | None]:
    """The least and the most that a step may be; None: any."""
    key = "time_step_limit"
    found = config.get_floats(key)
    if not found:
        return 0.0, None
    if len(found) != 2 or not 0.0 <= found[0] <= found[1] or not isfinite(found[0]):
        raise config.error(key, "must be two numbers from 0 on, the second no less than the first")
    return found[0], found[1] if found[1] < _LARGEST else None
