"""What a block tells the tracer of itself (`Block`), and `Columns`, the one block without
arithmetic.

Hides how checkpoint names come from the place of a block in its model.
"""

from __future__ import annotations

import re
from dataclasses import replace
from math import prod
from typing import ClassVar

import torch
from torch import Tensor, nn

from hmc.checkpoint.jsonfile import quote
from hmc.errors import ConfigError
from hmc.graph import Attr, DType, NodeMeta, Section, WeightSpec, attrs
from hmc.ops import OPS

Names = tuple[tuple[str, str], ...]
"""(regular expression, replacement) pairs that turn a weight's name, as it follows from the place
of its block, into that of checkpoints; applied in order."""


class Block(nn.Module):
    """A leaf of the trace: one node, of kind `kind`, whose result has `width` elements a token.

    `dtype` is the format in which the result passes to its readers at run time; a reference
    `forward` stays in float32. `kind` is an op of hmc/ops.
    """

    kind: ClassVar[str]
    dtype: ClassVar[DType] = "f32"
    width: int
    published: Names = ()

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        """The weights the block reads when it sits at `path`; each role names a parameter of the
        block.
        """
        return ()

    def stored(self, path: str) -> tuple[WeightSpec, ...]:
        """`weights`, by their names in the checkpoint (`publish`)."""
        return tuple(
            replace(spec, name=_renamed(spec.name, self.published)) for spec in self.weights(path)
        )

    def meta(self, layer: int, section: Section, weights: tuple[WeightSpec, ...] = ()) -> NodeMeta:
        """What hmc knows of a node that calls the block."""
        return NodeMeta(
            self.kind, layer, self.width, self.dtype, section, weights, self.attributes()
        )

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        """Sizes and options of the node, as `NodeMeta.attrs` holds them: the block's own, by the
        names of its row.
        """
        names = OPS[self.kind].attrs if self.kind in OPS else ()
        return attrs(**{name: getattr(self, name) for name in names})


def place(module: nn.Module, layer: int, section: Section = "") -> nn.Module:
    """Say of a module, and of all within it, which layer it is in (-1: none) and which half of it;
    returns the module. Whoever builds a model says this, names never do.
    """
    for each in module.modules():
        each.place = (layer, section)  # type: ignore[assignment]
    return module


def place_of(module: nn.Module) -> tuple[int, Section]:
    """What `place` said of a module: (layer, section)."""
    return getattr(module, "place", (-1, ""))


def publish(module: nn.Module, names: Names) -> None:
    """Say of all blocks of a model how checkpoints call their weights."""
    for each in module.modules():
        if isinstance(each, Block):
            each.published = names


def _renamed(name: str, names: Names) -> str:
    for pattern, replacement in names:
        name = re.sub(pattern, replacement, name)
    return name


class Columns(Block):
    """Columns [offset, offset + width) of each row: [T, any] -> [T, width]; `index` counts the
    parts of the split.
    """

    kind = "item"

    def __init__(self, index: int, offset: int, width: int) -> None:
        super().__init__()
        self.index, self.offset, self.width = index, offset, width

    def meta(self, layer: int, section: Section, weights: tuple[WeightSpec, ...] = ()) -> NodeMeta:
        """What hmc knows of a node that calls the block."""
        return NodeMeta(
            self.kind, layer, self.width, self.dtype, section, weights, self.attributes()
        )

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(index=self.index, offset=self.offset, width=self.width)

    def forward(self, x: Tensor) -> Tensor:
        return x[:, self.offset : self.offset + self.width]


_MOST = 1 << 40
"""Elements of a weight that any machine could hold."""


def parameter(*shape: int) -> nn.Parameter:
    """An uninitialised parameter on the current default device (meta when a model is built for
    tracing). `ConfigError` for sizes that are none.
    """
    if not 0 <= prod(shape) <= _MOST or max(shape) > _MOST:
        raise ConfigError(f"config.json: its sizes ask for a weight of {quote(list(shape))}")
    return nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=False)


def sibling(path: str, name: str) -> str:
    """`name` beside the module at `path`: `("model.norm", "x.weight") -> "model.x.weight"`."""
    parent = path.rpartition(".")[0]
    return f"{parent}.{name}" if parent else name
