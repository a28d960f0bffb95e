"""Hyper-connections: n residual streams side by side in a row, [T, n * width]."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hmc.blocks.base import Block, parameter, sibling
from hmc.graph import Attr, WeightSpec, attrs
from hmc.ops.hyper import MIXED, READ, WRITTEN, weights_of

Tensors = Mapping[str, Tensor]


def hyper_weights(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """With what streams are read, written and mixed, as many `parts` of these: mixes [..., n],
    [..., 2 n] or [..., n (n + 2)] -> the same.
    """
    n, parts, eps, mixes = (
        int(attrs["streams"]), int(attrs["parts"]), float(attrs["eps"]), inputs["mixes"],
    )  # fmt: skip
    scale, base = weights["scale"].float(), weights["base"].float()
    pre = torch.sigmoid(mixes[..., :n] * scale[0] + base[:n]) + eps
    if parts == READ:
        return {"y": pre}, states
    post = torch.sigmoid(mixes[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    post = float(attrs["magnitude"]) * post
    if parts == WRITTEN:
        return {"y": torch.cat((pre, post + eps), -1)}, states
    comb = _parts(mixes[..., 2 * n :] * scale[2] + base[2 * n :], n)
    comb = comb.softmax(-1) + eps
    for turn in range(2 * int(attrs["iterations"]) - 1):
        comb = comb / (comb.sum(-1 if turn % 2 else -2, keepdim=True) + eps)
    return {"y": torch.cat((pre, post, comb.flatten(-2)), -1)}, states


def hyper_in(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """The mixture that a layer reads."""
    n = int(attrs["streams"])
    streams = _parts(inputs["h"], n)
    return {"y": (inputs["weights"][..., :n, None] * streams).sum(-2)}, states


def hyper_out(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """The streams after a layer whose result is x."""
    n = int(attrs["streams"])
    post = inputs["weights"][..., n : 2 * n, None]
    streams = _parts(inputs["h"], n)
    if int(attrs["parts"]) == MIXED:
        streams = _parts(inputs["weights"][..., 2 * n :], n).mT @ streams
    return {"y": (post * inputs["x"][..., None, :] + streams).flatten(-2)}, states


def hyper_copy(
    attrs: Mapping[str, Any], inputs: Tensors, weights: Tensors, states: Tensors
) -> tuple[Tensors, Tensors]:
    """Streams that are all x."""
    x = inputs["x"]
    return {"y": x.repeat(*(1,) * (x.ndim - 1), int(attrs["streams"]))}, states


def _parts(x: Tensor, count: int) -> Tensor:
    """Rows [..., count * k] as [..., count, k]."""
    return x.reshape(*x.shape[:-1], count, -1)


REFERENCES = {
    "hyper_weights": hyper_weights,
    "hyper_in": hyper_in,
    "hyper_out": hyper_out,
    "hyper_copy": hyper_copy,
}
"""By op."""


class _Hyper(Block):
    """A block that its reference computes, row by row."""

    names: ClassVar[tuple[str, ...]]
    """Of its inputs, in order."""

    def forward(self, *inputs: Tensor) -> Tensor:
        given = dict(zip(self.names, inputs, strict=True))
        weights = {spec.role: getattr(self, spec.role) for spec in self.weights("")}
        made, _ = REFERENCES[self.kind](dict(self.attributes()), given, weights, {})
        return made["y"]


class HyperWeights(_Hyper):
    """mixes -> the weights of a half of a layer, of as many columns: `parts` of them say what they
    are for (hmc/ops/hyper.py), [T, n], [T, 2 n] or, with `iterations` of Sinkhorn and Knopp, [T, n
    (n + 2)]. What is written is at most `magnitude` times a layer's result. `base` and `scale` are
    beside the block.
    """

    kind = "hyper_weights"
    names: ClassVar[tuple[str, ...]] = ("mixes",)

    def __init__(
        self, streams: int, parts: int, eps: float, *, iterations: int = 0, magnitude: float = 2.0
    ) -> None:
        super().__init__()
        self.streams, self.parts, self.eps = streams, parts, eps
        self.iterations, self.magnitude = iterations, magnitude
        self.width = weights_of(streams, parts)
        self.base = parameter(self.width)
        self.scale = parameter(parts)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        shapes = {"base": (self.width,), "scale": tuple(self.scale.shape)}
        return tuple(WeightSpec(role, sibling(path, role), shapes[role]) for role in shapes)


class HyperIn(_Hyper):
    """(streams [T, n width], weights) -> what a layer reads [T, width]."""

    kind = "hyper_in"
    names: ClassVar[tuple[str, ...]] = ("h", "weights")

    def __init__(self, width: int, streams: int, parts: int) -> None:
        super().__init__()
        self.width, self.streams, self.parts = width, streams, parts


class HyperOut(_Hyper):
    """(streams [T, n width], weights, result of a layer [T, width]) -> streams."""

    kind = "hyper_out"
    names: ClassVar[tuple[str, ...]] = ("h", "weights", "x")

    def __init__(self, width: int, streams: int, parts: int) -> None:
        super().__init__()
        self.one, self.streams, self.parts = width, streams, parts
        self.width = width * streams

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(width=self.one, streams=self.streams, parts=self.parts)


class HyperCopy(_Hyper):
    """x [T, width] -> streams [T, n width]."""

    kind = "hyper_copy"
    names: ClassVar[tuple[str, ...]] = ("x",)

    def __init__(self, width: int, streams: int) -> None:
        super().__init__()
        self.one, self.streams, self.width = width, streams, width * streams

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(width=self.one, streams=self.streams)
