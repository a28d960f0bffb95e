"""Linear attention by the gated delta rule as families put it together: projections and short
convolutions before the block `LinearAttention`, decays, a gated norm and a projection after it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks import Conv, Linear, LinearAttention, Vector
from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.views import View
from hmc.models.converted import rates
from hmc.models.windows import FULL

LINEAR = "linear_attention"
_ACT = "silu(x)"
_EPS = 1e-6
"""Beside the squared length of q and k."""


class Heads(NamedTuple):
    """Heads of values, of keys, elements of one of keys and of one of values, and how many tokens
    the short convolutions see.
    """

    total: int
    key_count: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def keys(self) -> int:
        """Columns of all keys."""
        return self.key_count * self.key_dim

    @property
    def values(self) -> int:
        """Columns of all values."""
        return self.total * self.value_dim


class GatedNorm(nn.Module):
    """Rows by head at a mean square of 1, times a weight and a gate, of which the SiLU or with
    `sigmoid` the sigmoid is taken.
    """

    def __init__(self, heads: int, size: int, eps: float, *, sigmoid: bool) -> None:
        super().__init__()
        self.heads, self.size, self.eps, self.sigmoid = heads, size, eps, sigmoid
        self.weight = Vector(size)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        parts, gate = (each.reshape(-1, self.heads, self.size) for each in (x, gate))
        power = parts.square().mean(-1, keepdim=True)
        opened = torch.sigmoid(gate) if self.sigmoid else functional.silu(gate)
        normed = parts * torch.rsqrt(power + self.eps) * self.weight()
        return (normed * opened).flatten(-2)  # type: ignore[no-any-return]


class DeltaNet(nn.Module):
    """What the mixers of all families share, which are called with x [T, hidden] and positions,
    which they do not read: `mixed` makes their result. `log` is that of `rates`, `tiled` that of
    the block `LinearAttention`.
    """

    def __init__(
        self,
        hidden: int,
        heads: Heads,
        eps: float,
        *,
        channels: bool,
        sigmoid: bool,
        log: bool,
        tiled: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.log = heads, log
        self.attention = LinearAttention(
            heads.total,
            heads.key_count,
            heads.key_dim,
            heads.value_dim,
            heads.key_dim**-0.5,
            channels=channels,
            tiled=tiled,
        )
        self.A_log = Vector(heads.total)
        self.dt_bias = Vector(heads.total * (heads.key_dim if channels else 1))
        self.norm = GatedNorm(heads.total, heads.value_dim, eps, sigmoid=sigmoid)
        self.out_proj = Linear(heads.values, hidden)

    def mixed(
        self, qkv: tuple[Tensor, Tensor, Tensor], decay: Tensor, beta: Tensor, gate: Tensor
    ) -> Tensor:
        """q and k [T, keys] and v [T, values] after their convolutions, decays a head or a channel,
        logits of how much of a token the state takes, a head, and the result's gate [T, values] ->
        [T, hidden].
        """
        q, k, v = qkv
        mixed = self.attention(self._unit(q), self._unit(k), v, decay, torch.sigmoid(beta))
        return self.out_proj(self.norm(mixed, gate))  # type: ignore[no-any-return]

    def rates(self) -> Tensor:
        """How fast the states of heads decay, below 0."""
        return rates(self.A_log(), self.log)

    def three(self, x: Tensor, projection: str, conv: str) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a projection and a convolution each, by the patterns of their names."""
        q, k, v = (
            self.get_submodule(conv.format(part))(self.get_submodule(projection.format(part))(x))
            for part in "qkv"
        )
        return q, k, v

    def _unit(self, x: Tensor) -> Tensor:
        """Each head at a length of 1."""
        parts = x.reshape(-1, self.heads.key_count, self.heads.key_dim)
        length = parts.square().sum(-1, keepdim=True)
        return (parts * torch.rsqrt(length + _EPS)).flatten(-2)


class GatedDeltaNet(DeltaNet):
    """Qwen's (arXiv 2412.06464): a decay a head. q, k and v lie in one tensor and share a
    convolution, the others in one each; those that `grouped` names ("qkvz", "ba") lie together in
    one, key head by key head.
    """

    def __init__(
        self,
        hidden: int,
        heads: Heads,
        eps: float,
        *,
        grouped: Collection[str] = (),
        log: bool = True,
        tiled: bool = False,
    ) -> None:
        super().__init__(hidden, heads, eps, channels=False, sigmoid=False, log=log, tiled=tiled)
        served = heads.total // heads.key_count
        self.apart = "qkvz" in grouped
        if self.apart:
            values = served * heads.value_dim
            sizes = {"q": heads.key_dim, "k": heads.key_dim, "v": values, "z": values}
            self._take_apart(hidden, "in_proj_qkvz", sizes)
            self._take_convolutions_apart()
        else:
            width = 2 * heads.keys + heads.values
            self.in_proj_qkv = Linear(hidden, width)
            self.in_proj_z = Linear(hidden, heads.values)
            self.conv1d = Conv(width, heads.taps, act=_ACT)
        if "ba" in grouped:
            self._take_apart(hidden, "in_proj_ba", {"b": served, "a": served})
        else:
            self.in_proj_b = Linear(hidden, heads.total)
            self.in_proj_a = Linear(hidden, heads.total)

    def _take_apart(self, hidden: int, name: str, sizes: Mapping[str, int]) -> None:
        """Projections as parts of the tensor that holds so many rows of each a key head."""
        count, step, first = self.heads.key_count, sum(sizes.values()), 0
        for part, run in sizes.items():
            view = View((step * count, hidden), first, step, run=run)
            linear = Linear(hidden, run * count, within=(f"{name}.weight", view))
            self.add_module(f"in_proj_{part}", linear)
            first += run

    def _take_convolutions_apart(self) -> None:
        heads = self.heads
        first, whole = 0, (2 * heads.keys + heads.values, 1, heads.taps)
        for part, width in zip("qkv", (heads.keys, heads.keys, heads.values), strict=True):
            held = "conv1d.weight", View(whole, first)
            conv = Conv(width, heads.taps, act=_ACT, state=f"conv_{part}", within=held)
            self.add_module(f"conv_{part}", conv)
            first += width

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        step = functional.softplus(self.in_proj_a(x) + self.dt_bias())
        decay = torch.exp(self.rates() * step)
        return self.mixed(self._convolved(x), decay, self.in_proj_b(x), self.in_proj_z(x))

    def _convolved(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        if self.apart:
            return self.three(x, "in_proj_{}", "conv_{}")
        mixed, keys = self.conv1d(self.in_proj_qkv(x)), self.heads.keys
        return mixed[:, :keys], mixed[:, keys : 2 * keys], mixed[:, 2 * keys :]


class KimiDeltaNet(DeltaNet):
    """Kimi's (arXiv 2510.26692): a decay a channel, through a rank as low as a head is wide where
    `low_rank`; of a `lower` bound, its logarithm is that at most (of weights as published alone).
    """

    def __init__(
        self,
        hidden: int,
        heads: Heads,
        eps: float,
        *,
        low_rank: bool,
        lower: float | None = None,
        log: bool = True,
    ) -> None:
        super().__init__(hidden, heads, eps, channels=True, sigmoid=True, log=log)
        self.low_rank, self.lower = low_rank, lower
        for part, width in zip("qkv", (heads.keys, heads.keys, heads.values), strict=True):
            self.add_module(f"{part}_proj", Linear(hidden, width))
            conv = Conv(width, heads.taps, act=_ACT, state=f"conv_{part}")
            self.add_module(f"{part}_conv1d", conv)
        for part, width in zip("fg", (heads.total * heads.key_dim, heads.values), strict=True):
            if low_rank:
                self.add_module(f"{part}_a_proj", Linear(hidden, heads.key_dim))
                self.add_module(f"{part}_b_proj", Linear(heads.key_dim, width))
            else:
                self.add_module(f"{part}_proj", Linear(hidden, width))
        self.b_proj = Linear(hidden, heads.total)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        qkv = self.three(x, "{}_proj", "{}_conv1d")
        return self.mixed(qkv, self._decay(x), self.b_proj(x), self._projected("g", x))

    def _decay(self, x: Tensor) -> Tensor:
        logits = self._projected("f", x) + self.dt_bias()
        logits = logits.reshape(-1, self.heads.total, self.heads.key_dim)
        if self.lower is None:
            return torch.exp(self.rates().unsqueeze(-1) * functional.softplus(logits)).flatten(-2)
        rate = torch.exp(self.A_log()).unsqueeze(-1)
        return torch.exp(torch.sigmoid(rate * logits) * self.lower).flatten(-2)

    def _projected(self, part: str, x: Tensor) -> Tensor:
        if not self.low_rank:
            return self.get_submodule(f"{part}_proj")(x)  # type: ignore[no-any-return]
        low = self.get_submodule(f"{part}_a_proj")(x)
        return self.get_submodule(f"{part}_b_proj")(low)  # type: ignore[no-any-return]


def kinds_of_layers(config: ModelConfig, key: str, every: int) -> tuple[str, ...]:
    """The kind of each layer, `LINEAR` or `FULL`: `layer_types` of the configuration, else every
    n-th is full, n as `key` says (`every` where it is absent).
    """
    depth = config.require_int("num_hidden_layers")
    found = config.get_strs("layer_types")
    if found:
        if len(found) < depth or {*found} - {FULL, LINEAR}:
            raise config.error(
                "layer_types", f"must say {FULL} or {LINEAR} for each of {depth} layers"
            )
        return found[:depth]
    every = config.get_int(key, every, minimum=1)
    return tuple(LINEAR if (index + 1) % every else FULL for index in range(depth))
