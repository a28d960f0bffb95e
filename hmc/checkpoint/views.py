"""How a parameter lies in a stored tensor that holds more than it: an expert of a stack, some rows.

Rows that follow each other are where bytes are, nothing is copied or converted: planes of codes and
of scales are cut at the same rows. Others, every second one, some of each head or columns, are put
beside each other when weights are opened (`Pick`), bit for bit.
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
    """A weight [n, k] is n rows from `first` on, a `run` of them every `step` rows, of a tensor of
    `shape` [rows, k], or of each expert of one of `shape` [experts, rows, k]; `transposed`, of [k,
    rows] and [experts, k, rows]. A vector [n] is such elements of [elements] or [experts,
    elements].
    """

    shape: tuple[int, ...]
    first: int = 0
    step: int = 1
    transposed: bool = False
    run: int = 1

    def stacked(self, shape: tuple[int, ...]) -> bool:
        """Whether experts, each a weight of `shape`, lie in one tensor."""
        return len(self.shape) > len(shape)

    def of(self, name: str, rows: int) -> str:
        """What a weight of `rows` rows is called, apart from others of the tensor `name`."""
        end = self.first + (rows // self.run - 1) * self.step + self.run
        step = f":{self.step}" if self.step > 1 else ""
        step += f"x{self.run}" if self.run > 1 else ""
        return f"{name}[{self.first}:{end}{step}]{'.T' if self.transposed else ''}"


@dataclass(frozen=True)
class Pick:
    """Of a plane that is stored as `rows` rows of elements those from `first` on, a `run` of
    them every `step`; `transposed`: of one stored as columns of them.
    """

    rows: int
    first: int
    step: int
    transposed: bool
    run: int


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
        before = plane.stored_shape((first, *shape[1:]), group, tensor.dtype) if first else (0,)
        own = plane.stored_shape(shape, group, tensor.dtype)
        if plane.layout is not AS_READ and own != tensor.shape:
            raise TensorError(f"tensor {tensor.name}: rows of {form} do not lie together in it")
        place = tensor.offset + prod(before) * bits // 8
        cut.append(replace(tensor, shape=own, offset=place, nbytes=prod(own) * bits // 8))
    return tuple(cut)


def picked(
    tensors: tuple[TensorInfo, ...], form: str, group: int, view: View, shape: tuple[int, ...]
) -> tuple[tuple[TensorInfo, ...], tuple[Pick | None, ...]]:
    """As `rows_of`, of rows that lie apart or in columns: tensors as large as the weight's planes,
    where all rows begin, and which of these they are. `TensorError` also where elements that are
    packed, or are of more rows than columns, would have to be turned.
    """
    whole = view.shape[-len(shape) :]
    rows = whole[-1] if view.transposed else whole[0]
    found: list[TensorInfo] = []
    picks: list[Pick | None] = []
    for plane, tensor in zip(format_of(form).planes, tensors, strict=True):
        high = plane.rows
        if not high and not plane.columns:  # of all elements, and so of these
            found.append(tensor)
            picks.append(None)
            continue
        turned = plane.bits or plane.block[1] or high != plane.columns
        steps = (view.first, view.run, view.step) if view.step > 1 else (view.first,)
        scattered = not high or any(number % high for number in steps)
        if plane.layout is not AS_READ or scattered or (view.transposed and turned):
            raise TensorError(
                f"tensor {tensor.name}: elements of {plane.name} of {form} are of rows of several"
                " weights, or not to be turned"
            )
        own = plane.stored_shape(shape, group, tensor.dtype)
        size = prod(own) * DTYPE_BITS[tensor.dtype] // 8
        found.append(replace(tensor, shape=own, nbytes=size))
        first, step, run = view.first, view.step, view.run
        if high > 1 and step > 1:
            step, run = step // high, run // high
        picks.append(Pick(-(-rows // high), first // high, step, view.transposed, run))
    return tuple(found), tuple(picks)
