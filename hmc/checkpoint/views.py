"""How a parameter lies in a stored tensor that holds more than it: an expert of a stack, some rows.

A view is where bytes are, nothing is copied or converted: planes of codes and of scales are cut at
the same rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod

from hmc.checkpoint.headers import TensorInfo
from hmc.errors import TensorError
from hmc.formats import DTYPE_BITS, format_of
from hmc.formats.layouts import AS_READ


@dataclass(frozen=True)
class View:
    """A weight [n, k] is rows [first, first + n) of a tensor of `shape` [rows, k], or of each
    expert of one of `shape` [experts, rows, k].
    """

    shape: tuple[int, ...]
    first: int = 0

    @property
    def stacked(self) -> bool:
        """Whether experts lie in one tensor."""
        return len(self.shape) == 3

    def of(self, name: str, rows: int) -> str:
        """What a weight of `rows` rows is called, apart from others of the tensor `name`."""
        return f"{name}[{self.first}:{self.first + rows}]"


@dataclass(frozen=True)
class Stack(Mapping[str, TensorInfo]):
    """The tensors of a checkpoint as one expert of `count` sees them: of each its slice."""

    tensors: Mapping[str, TensorInfo]
    expert: int
    count: int

    def __getitem__(self, name: str) -> TensorInfo:
        whole = self.tensors[name]
        if not whole.shape or whole.shape[0] != self.count:
            raise TensorError(
                f"tensor {name} has shape {list(whole.shape)}, {self.count} experts are stacked"
            )
        size = whole.nbytes // self.count
        offset = whole.offset + self.expert * size
        return replace(whole, shape=whole.shape[1:], offset=offset, nbytes=size)

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)


def rows_of(
    tensors: tuple[TensorInfo, ...], form: str, group: int, first: int, shape: tuple[int, ...]
) -> tuple[TensorInfo, ...]:
    """The planes of `tensors`, of format `form`, cut to a weight of `shape` from row `first` on;
    `TensorError` where a block of scales covers rows of two weights, or rows lie scattered.
    """
    cut = []
    for plane, tensor in zip(format_of(form).planes, tensors, strict=True):
        if not plane.rows:  # of all rows, and so of these
            cut.append(tensor)
            continue
        if first % plane.rows:
            raise TensorError(
                f"tensor {tensor.name}: row {first} begins within a block of {plane.name}"
            )
        bits = DTYPE_BITS[tensor.dtype]
        before = plane.stored_shape((first, shape[1]), group, tensor.dtype) if first else (0,)
        own = plane.stored_shape(shape, group, tensor.dtype)
        if plane.layout is not AS_READ and own != tensor.shape:
            raise TensorError(f"tensor {tensor.name}: rows of {form} do not lie together in it")
        place = tensor.offset + prod(before) * bits // 8
        cut.append(replace(tensor, shape=own, offset=place, nbytes=prod(own) * bits // 8))
    return tuple(cut)
