"""What a weight format is: the planes that a weight lies in, and how they are found.

A plane is one tensor of a stored weight: its codes, their scales, the codes of zero. `Plane` says
which numbers it holds and which block of the weight each of them covers; sizes, memory, kernels'
parameters, dummy weights and the checks of a checkpoint and of a plan follow from that (`forms`).
Hides how elements of fewer bits than a word are packed, how a checkpoint may lay a plane out
otherwise than kernels read it (`Layout`), and what becomes of numbers that kernels do not read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from hmc.errors import UnsupportedError
from hmc.formats.layouts import AS_READ, Layout

if TYPE_CHECKING:
    from hmc.checkpoint.config import ModelConfig

DTYPE_BITS: Mapping[str, int] = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64, "C64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
    "Q4_0": 8, "Q4_1": 8, "Q5_0": 8, "Q5_1": 8, "Q8_0": 8, "Q2_K": 8, "Q3_K": 8, "Q4_K": 8,
    "Q5_K": 8, "Q6_K": 8, "IQ4_NL": 8, "IQ4_XS": 8, "GGML_MXFP4": 8,
}  # fmt: skip
"""Bits per element of every dtype of safetensors, by its spelling there; and of the block types of
GGUF, whose tensors are rows of bytes here."""

WHOLE = 0
"""As `Plane.rows` or `Plane.columns`: one element covers all of them."""
GROUP = -1
"""As `Plane.columns`: one element covers as many as the weight's `group` says."""

WIDE = "F32"
"""What numbers become in memory that kernels do not read as they are stored."""

Arithmetic = Literal["f32", "bf16", "fp8", "whole"]
"""Kinds of products: of f32; of bf16 pairs; of FP8 codes; of 16-bit whole numbers, which values are
or twice of them is."""
Kind = Literal["scale", "zero", "order"]


@dataclass(frozen=True)
class Plane:
    """One tensor of a weight [N, K].

    The first plane of a weight are its codes; the `kind` of others: scales, which codes are
    multiplied by; zeros, the code that stands for 0; or the order (i32): columns lie in memory
    group after group, and it says of each place which column of the weight lies there. `dtypes` are
    those it may be stored in, the first one that of invented weights; `suffixes` what may follow
    the weight's name in the tensor's (`named`). An element covers `rows` x `columns` of the weight
    (`WHOLE`, `GROUP`); the last block of a row may be cut, unless it is not `ragged`. `bits` of an
    element are packed into words of the dtype, the first in the lowest ones, rows padded to whole
    words; 0: an element is a word. `block` of (columns, bytes): codes, scales and all of so many
    columns are a struct of so many bytes, and elements are bytes.

    Kernels read the dtypes `kept` as stored (none named: all), others are widened to f32 when
    weights are opened. `layout` says how a checkpoint lays the plane out; where that is not as
    kernels read it, it is brought there when weights are opened, bit for bit.
    """

    name: str
    dtypes: tuple[str, ...]
    suffixes: tuple[str, ...] = ("",)
    rows: int = 1
    columns: int = 1
    ragged: bool = True
    bits: int = 0
    kept: tuple[str, ...] = ()
    kind: Kind = "scale"
    block: tuple[int, int] = (1, 0)
    layout: Layout = AS_READ

    def means(self, dtype: str) -> str:
        """What the bytes of a tensor of `dtype` are: scales in U8 are exponents."""
        if self.block[1]:
            return "U8"
        covers = self.rows != 1 or self.columns != 1
        return "F8_E8M0" if covers and dtype == "U8" else dtype

    def in_memory(self, dtype: str) -> str:
        """The dtype that kernels read where `dtype` is stored."""
        dtype = self.layout.makes or self.means(dtype)
        return WIDE if self.kept and dtype not in self.kept else dtype

    def elements(self, shape: tuple[int, ...], group: int) -> tuple[int, int]:
        """Rows and columns of its elements for a weight of `shape`."""
        rows, columns = matrix_of(shape)
        if self.block[1]:
            return rows, -(-columns // self.block[0]) * self.block[1]
        across = group if self.columns == GROUP else self.columns
        return -(-rows // (self.rows or rows)), -(-columns // (across or columns))

    def stored_shape(self, shape: tuple[int, ...], group: int, dtype: str) -> tuple[int, ...]:
        """Shape of the tensor in the checkpoint."""
        if self.layout is AS_READ:
            return self.memory_shape(shape, group, dtype)
        return self.layout.shape(*self.elements(shape, group), DTYPE_BITS[dtype])

    def memory_shape(self, shape: tuple[int, ...], group: int, dtype: str) -> tuple[int, ...]:
        """Shape as kernels read it, in words of `dtype`."""
        if self.rows == self.columns == 1 and not self.bits and not self.block[1]:
            return shape
        rows, columns = self.elements(shape, group)
        return rows, -(-columns * (self.bits or DTYPE_BITS[dtype]) // DTYPE_BITS[dtype])


def named(weight: str, suffix: str) -> str:
    """The tensor of a plane: `suffix` follows the weight's name, or where it begins with a dot the
    name of its module ("...q_proj.weight", ".qweight": "...q_proj.qweight").
    """
    return (weight.removesuffix(".weight") if suffix.startswith(".") else weight) + suffix


@dataclass(frozen=True)
class Described:
    """What a `quantization_config` says of the weights that it does not keep out.

    `whole` is all of it, `weights` where their numbers stand (compressed-tensors: the `weights` of
    its group, whose `format` is `packing`; else `whole` again).
    """

    method: str
    whole: ModelConfig
    weights: ModelConfig
    packing: str = ""


@dataclass(frozen=True)
class Storage:
    """How the weights of a checkpoint that are quantised lie in it.

    `suffixes` follow a weight's name in the tensors of its planes, in their order; `group` is what
    `GROUP` means, 0 where no plane asks. `beside` are tensors without which a weight is not whole,
    though nothing of them is needed: suffix, dtypes, shape.
    """

    format: str
    suffixes: tuple[str, ...]
    group: int = 0
    beside: tuple[tuple[str, tuple[str, ...], tuple[int, ...]], ...] = ()


def nothing(described: Described) -> None:
    """No configuration speaks of a format that its dtype tells."""
    return


@dataclass(frozen=True)
class Format:
    """A weight format: one row of `FORMATS`.

    A weight is `values[code]` (without `values` the code itself, a float), less the zero that
    covers it, times every scale that covers it (`formats/decode.py`); of a format of blocks what
    `formats/blocks.py` makes of them. `exact_in` are the arithmetics in which products of codes are
    exact. Weights of formats that differ in their stored layout alone lie alike in memory: kernels
    know them as the one that they are `read_as`.
    `find` reads a configuration: a `Storage`, or None where it speaks of another format;
    `UnsupportedError` where it speaks of this one and asks for what is not read. Formats without
    scales are found by their dtype. `about` is a phrase for plans with {scale}, the dtype of each
    plane by its name, and {group}.
    """

    name: str
    title: str
    planes: tuple[Plane, ...]
    exact_in: tuple[Arithmetic, ...]
    about: str = ""
    values: tuple[float, ...] = ()
    find: Callable[[Described], Storage | None] = nothing
    read_as: str = ""

    @property
    def codes(self) -> Plane:
        """The plane of codes: the first."""
        return self.planes[0]

    @property
    def scales(self) -> tuple[Plane, ...]:
        """All other planes."""
        return self.planes[1:]

    @property
    def kernels(self) -> str:
        """The format that kernels know its weights as."""
        return self.read_as or self.name

    @property
    def grouped(self) -> bool:
        """Whether a weight's `group` says how its scales lie."""
        return any(plane.columns == GROUP for plane in self.planes)

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return self.codes.bits or DTYPE_BITS[self.codes.dtypes[0]]

    @property
    def weight_bits(self) -> float:
        """Bits of the codes of one weight; of a format of blocks those of its share of a block."""
        columns, size = self.codes.block
        return 8 * size / columns if size else self.code_bits

    @property
    def terms(self) -> int:
        """Numbers in bf16 whose sum a code is: what a GPU multiplies by, one after the other."""
        return 1 if self.values else {"F32": 3, "F16": 2}.get(self.codes.dtypes[0], 1)

    @property
    def nan_codes(self) -> tuple[int, ...]:
        """Codes that are no number."""
        return tuple(code for code, value in enumerate(self.values) if value != value)

    def note(self, group: int, dtypes: Iterable[str]) -> str:
        """`about` for a weight."""
        names = (plane.name for plane in self.planes)
        return self.about.format(group=group, **dict(zip(names, dtypes, strict=True)))

    def row_bytes(self, columns: int) -> int:
        """Bytes of the codes of one row."""
        if self.codes.block[1]:
            return self.codes.elements((1, columns), 0)[1]
        bits = DTYPE_BITS[self.codes.dtypes[0]]
        return -(-columns * self.code_bits // bits) * bits // 8

    def whole_groups(self, columns: int, group: int) -> bool:
        """Whether rows of `columns` weights have no cut block where none may be."""
        each = [group if plane.columns == GROUP else plane.columns for plane in self.planes
                if not plane.ragged]  # fmt: skip
        each.append(self.codes.block[0])
        return all(size > 0 and columns % size == 0 for size in each)


@dataclass(frozen=True)
class Form:
    """A plane of one weight: stored as `dtype` [`stored`], in memory as `kept` [`shape`] (packed
    ones stay words); `group` as of the weight.
    """

    plane: Plane
    dtype: str
    kept: str
    stored: tuple[int, ...]
    shape: tuple[int, ...]
    group: int

    @property
    def stored_bytes(self) -> int:
        """Bytes in the checkpoint."""
        return math.prod(self.stored) * DTYPE_BITS[self.dtype] // 8

    @property
    def bytes(self) -> int:
        """Bytes in memory."""
        return math.prod(self.shape) * DTYPE_BITS[self.kept] // 8

    @property
    def as_stored(self) -> bool:
        """Whether memory holds the bytes of the checkpoint."""
        return self.plane.layout is AS_READ and not self.widened

    @property
    def widened(self) -> bool:
        """Whether its numbers become f32 on the way to memory."""
        return self.kept != (self.plane.layout.makes or self.plane.means(self.dtype))


def forms(
    row: Format, shape: tuple[int, ...], group: int, dtypes: Iterable[str]
) -> tuple[Form, ...]:
    """Every plane of a weight of `shape`, stored in `dtypes`; `UnsupportedError` for a shape, a
    group, dtypes or a number of planes that the format does not have.
    """
    found = tuple(dtypes)
    if len(found) != len(row.planes):
        raise UnsupportedError(f"{len(found)} planes, {row.name} has {len(row.planes)}")
    for plane, dtype in zip(row.planes, found, strict=True):
        if dtype not in plane.dtypes:
            raise UnsupportedError(
                f"{row.name} {plane.name} in {dtype}: it is {' or '.join(plane.dtypes)}"
            )
    if (row.grouped) != (group > 0):
        raise UnsupportedError(f"{row.name} with groups of {group}")
    if (row.scales or row.codes.block[1]) and len(shape) != 2:
        raise UnsupportedError(f"{row.name} of shape {list(shape)}: it has two dimensions")
    if not row.whole_groups(matrix_of(shape)[1], group):
        raise UnsupportedError(f"{row.name} of shape {list(shape)}: rows are whole groups")
    return tuple(
        Form(
            plane,
            dtype,
            kept := plane.in_memory(dtype),
            plane.stored_shape(shape, group, dtype),
            plane.memory_shape(shape, group, kept),
            group,
        )
        for plane, dtype in zip(row.planes, found, strict=True)
    )


def kernel_params(row: Format, group: int, dtypes: Iterable[str]) -> dict[str, int]:
    """What kernels must know of a weight besides its format: `group` where it varies, and of each
    plane that is kept in more than one dtype which of them it is in (a place in `Plane.kept`).
    """
    params = {"group": group} if row.grouped else {}
    for plane, dtype in zip(row.planes, dtypes, strict=True):
        if len(plane.kept) > 1:
            params[f"{plane.name}_dtype"] = plane.kept.index(plane.in_memory(dtype))
    return params


def matrix_of(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a weight; a vector is one row."""
    return (1, math.prod(shape)) if len(shape) != 2 else (shape[0], shape[1])


def minifloats(exponent_bits: int, mantissa_bits: int, infinities: bool) -> tuple[float, ...]:
    """The value of every code of a small float: sign, exponent, mantissa, the usual bias,
    subnormals. Without `infinities` the largest exponent is one like the others, and only its
    largest mantissa is NaN (E4M3FN); with them it has infinity and NaN (IEEE, E5M2).
    """
    bias, top, steps = 2 ** (exponent_bits - 1) - 1, 2**exponent_bits - 1, 2**mantissa_bits

    def magnitude(code: int) -> float:
        exponent, mantissa = divmod(code, steps)
        if exponent == top and (infinities or mantissa == steps - 1):
            return float("inf") if infinities and not mantissa else float("nan")
        lifted = mantissa + (steps if exponent else 0)
        return math.ldexp(lifted, max(exponent, 1) - bias - mantissa_bits)

    half = [magnitude(code) for code in range(2 ** (exponent_bits + mantissa_bits))]
    return (*half, *(-value for value in half))
