"""Expressions in torch: the activation of gate and up, and `Pointwise`, which stands for a piece of
a model file's own arithmetic; `Vector`, a weight that such arithmetic reads.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn import functional

from hmc.blocks.base import Block, parameter
from hmc.codegen.expr import WEIGHT, Expr, evaluate, parse
from hmc.codegen.rowwise import INPUTS, WEIGHTS, Rowwise
from hmc.graph import Attr, DType, WeightSpec, attrs
from hmc.ops.pointwise import attributes


def _lesser(x: Tensor | float, y: Tensor | float) -> Tensor:
    if isinstance(x, float):
        return _lesser(y, x)
    return torch.clamp(x, max=y)


def _greater(x: Tensor | float, y: Tensor | float) -> Tensor:
    if isinstance(x, float):
        return _greater(y, x)
    return torch.clamp(x, min=y)


TORCH: Final[Mapping[str, Callable[..., Any]]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "neg": operator.neg,
    "less": operator.lt,
    "less_equal": operator.le,
    "where": torch.where,
    "minimum": _lesser,
    "maximum": _greater,
    "relu": torch.relu,
    "square": torch.square,
    "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt,
    "exp": torch.exp,
    "sigmoid": torch.sigmoid,
    "silu": functional.silu,
    "tanh": torch.tanh,
    "softplus": functional.softplus,
    "gelu": functional.gelu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "sum": partial(torch.sum, dim=-1, keepdim=True),
    "mean": partial(torch.mean, dim=-1, keepdim=True),
}
"""What operations mean; constants are plain numbers, so that nothing is copied to a device."""


def activated(text: str, gate: Tensor | None, up: Tensor, weight: Tensor | None = None) -> Tensor:
    """The activation of an MLP, with a gate or without, element by element, in the operands' dtype;
    of experts also with a token's `weight` [T, 1].
    """
    given = {"gate": gate, "up": up, WEIGHT: weight}
    operands = {name: each for name, each in given.items() if each is not None}
    result: Tensor = evaluate(parse(text), operands.__getitem__, TORCH, float)
    return result


def pointwise(form: Rowwise, operands: Mapping[str, Tensor]) -> Tensor:
    """An expression over rows: inputs [T, columns], vectors [columns] -> [T, columns]."""
    shaped = {name: form.by_group(name, each) for name, each in operands.items()}
    result: Tensor = evaluate(form.tree, shaped.__getitem__, TORCH, float)
    return result.flatten(1)


class Vector(Block):
    """A weight of `width` elements at the block's own checkpoint name, for a model file's plain
    arithmetic: `(1 + self.weight()) * x`.
    """

    kind = "vector"

    def __init__(self, width: int) -> None:
        super().__init__()
        self.width = width
        self.value = parameter(width)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return (WeightSpec("value", path, (self.width,)),)

    def forward(self) -> Tensor:
        return self.value


class Pointwise(Block):
    """A piece of arithmetic as one node: inputs in the order of their names, x0, ..., b0, ...;
    `vectors` likewise, v0, ..., g0, ....

    The fuse pass puts it where it found the piece, so `dtype` is what the readers want.
    """

    kind = "pointwise"

    def __init__(self, form: Rowwise, vectors: Sequence[Vector], dtype: DType) -> None:
        super().__init__()
        self.form, self.dtype = form, dtype  # type: ignore[misc]
        self.vectors = nn.ModuleList(vectors)
        self.width = form.result

    @property
    def tree(self) -> Expr:
        """The expression."""
        return self.form.tree

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(**attributes(self.form, self.dtype))

    def forward(self, *inputs: Tensor) -> Tensor:
        names = [name for name in INPUTS if name in self.tree.leaves]
        operands = dict(zip(names, inputs, strict=True))
        weights = [name for name in WEIGHTS if name in self.tree.leaves]
        values = [vector() for vector in self.vectors]
        return pointwise(self.form, operands | dict(zip(weights, values, strict=True)))
