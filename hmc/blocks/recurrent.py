"""Blocks with a state of fixed size a sequence; their references go token by token.

A reference works on S sequences of T tokens: inputs [S, T, width], states [S, width]. A block's
`forward` is that of one sequence from a state of zeros.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.pointwise import TORCH
from hmc.checkpoint.views import View
from hmc.codegen.expr import evaluate, parse
from hmc.graph import WeightSpec
from hmc.ops import OPS

Tensors = Mapping[str, Tensor]


def conv(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """Causal convolution of each column with `taps` weights of its own [width, 1, taps]; the state
    is the last taps - 1 inputs, [taps - 1, width], oldest first.
    """
    x, name = inputs["x"], str(attrs["state"])
    past = states[name].reshape(len(x), -1, x.shape[2]).to(x.dtype)
    every = torch.cat((past, x), 1)
    taps = weights["weight"].reshape(-1, int(attrs["taps"])).T
    y = sum(every[:, i : i + x.shape[1]] * tap for i, tap in enumerate(taps))
    if "bias" in weights:
        y = y + weights["bias"]
    y = evaluate(parse(str(attrs["act"])), {"x": y}.__getitem__, TORCH, float)
    return {"y": y}, {name: every[:, x.shape[1] :].flatten(1)}


def linear_attention(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """Linear attention with decay, of heads whose state is S [key_dim, value_dim]: with `delta` the
    gated delta rule (Yang et al., arXiv 2412.06464), without it a gated sum, which Mamba 2 is too
    (Dao and Gu, arXiv 2405.21060). Decays are one a head or, with `channels`, one a column of its
    keys (Kimi Linear, arXiv 2510.26692). Key head h of m serves heads h n, ..., (h + 1) n - 1 or,
    `tiled`, heads h, h + m, h + 2 m, ...
    """
    heads, key_heads = int(attrs["heads"]), int(attrs["key_heads"])
    key_dim, value_dim = int(attrs["key_dim"]), int(attrs["value_dim"])

    def by_head(name: str, count: int) -> tuple[Tensor, ...]:
        x = inputs[name]
        x = x.reshape(*x.shape[:2], count, -1)
        if attrs["tiled"]:
            return x.repeat(1, 1, heads // count, 1).unbind(1)
        return x.repeat_interleave(heads // count, 2).unbind(1)

    q, k = by_head("q", key_heads), by_head("k", key_heads)
    v, decay = by_head("v", heads), by_head("decay", heads)
    state = states["recurrent"].reshape(-1, heads, key_dim, value_dim)
    made = []
    for t, key in enumerate(k):
        state = state * decay[t][..., None]
        new = v[t]
        if attrs["delta"]:
            beta = inputs["beta"][:, t, :, None]
            new = (new - torch.einsum("shk,shkv->shv", key, state)) * beta
        state = state + key[..., None] * new[..., None, :]
        made.append(torch.einsum("shk,shkv->shv", q[t] * attrs["scale"], state).flatten(1))
    return {"y": torch.stack(made, 1)}, {"recurrent": state.flatten(1)}


def selective_scan(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """The scan of Mamba (Gu and Dao, arXiv 2312.00752, algorithm 2): each column has `states`
    elements, which decay by rates of their own in steps of dt. The state is [states, width].
    """
    rate = weights["a"].T.to(inputs["dt"].dtype)
    rate = -torch.exp(rate) if attrs["log"] else rate
    state = states["scan"].reshape(-1, *rate.shape)
    made = []
    for t, x in enumerate(inputs["x"].unbind(1)):
        dt, b, c = (inputs[name][:, t] for name in ("dt", "b", "c"))
        state = state * torch.exp(dt[:, None] * rate) + (dt * x)[:, None] * b[..., None]
        made.append((state * c[..., None]).sum(1))
    return {"y": torch.stack(made, 1)}, {"scan": state.flatten(1)}


REFERENCES = {
    "conv": conv,
    "linear_attention": linear_attention,
    "selective_scan": selective_scan,
}
"""By op."""


class _Recurrent(Block):
    """A block that its reference computes, from a state of zeros."""

    roles: ClassVar[tuple[str, ...]] = ()

    def forward(self, *inputs: Tensor) -> Tensor:
        about = dict(self.attributes())
        names = [role.name for role in OPS[self.kind].read(about)]
        given = dict(zip(names, (each[None] for each in inputs), strict=True))
        weights = {role: getattr(self, role) for role in self.roles if hasattr(self, role)}
        kept = OPS[self.kind].states(about)
        zeros = {state.name: torch.zeros(1, state.width) for state in kept}
        made, _ = REFERENCES[self.kind](about, given, weights, zeros)
        return made["y"][0]


class Conv(_Recurrent):
    """Short causal convolution, column by column: x [T, width] -> [T, width].

    `weight` [width, 1, taps] and, with `bias`, `bias` [width] are beside one another at the block's
    name; `act` is an expression in x. A layer that has several gives each a `state` of its own.
    `within` names the tensor beside the block that holds the weight among others, and how.
    """

    kind = "conv"
    roles = ("weight", "bias")

    def __init__(
        self,
        width: int,
        taps: int,
        *,
        act: str = "x",
        bias: bool = False,
        state: str = "conv",
        within: tuple[str, View] | None = None,
    ) -> None:
        super().__init__()
        self.width, self.taps, self.act, self.state = width, taps, act, state
        self.within = within
        self.weight = parameter(width, 1, taps)
        if bias:
            self.bias = parameter(width)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        name, view = f"{path}.weight", None
        if self.within is not None:
            name, view = sibling(path, self.within[0]), self.within[1]
        found = [WeightSpec("weight", name, (self.width, 1, self.taps), view=view)]
        if hasattr(self, "bias"):
            found.append(WeightSpec("bias", f"{path}.bias", (self.width,)))
        return tuple(found)


class LinearAttention(_Recurrent):
    """Linear attention with decay (`linear_attention`): q, k [T, key_heads * key_dim], v [T, heads
    * value_dim], decay [T, heads] or, with `channels`, [T, heads * key_dim], each in [0, 1], and
    with `delta` also beta [T, heads] -> [T, heads * value_dim]. `tiled` says which heads share keys
    (`linear_attention`).
    """

    kind = "linear_attention"

    def __init__(
        self,
        heads: int,
        key_heads: int,
        key_dim: int,
        value_dim: int,
        scale: float,
        *,
        channels: bool = False,
        delta: bool = True,
        tiled: bool = False,
    ) -> None:
        super().__init__()
        self.heads, self.key_heads, self.key_dim = heads, key_heads, key_dim
        self.value_dim, self.scale = value_dim, scale
        self.channels, self.delta, self.tiled = int(channels), int(delta), int(tiled)
        self.width = heads * value_dim


class SelectiveScan(_Recurrent):
    """The scan of Mamba: x, dt [T, width], b, c [T, states] -> [T, width].

    `a` [width, states], the rates or, with `log`, the logarithms of what they are below 0, is what
    the checkpoint calls `name` beside the block.
    """

    kind = "selective_scan"
    roles = ("a",)

    def __init__(self, width: int, states: int, *, name: str = "A_log", log: bool = True) -> None:
        super().__init__()
        self.width, self.states, self.name, self.log = width, states, name, int(log)
        self.a = parameter(width, states)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return (WeightSpec("a", sibling(path, self.name), (self.width, self.states)),)
