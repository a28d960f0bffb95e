"""What of a weight format's row is compiled into kernels: how a code becomes a number, and which
block of the matrix each scale covers. Nothing here asks for a format's name.

A code becomes one or several bf16 terms whose sum it is exactly, so that products are those of
tensor cores and sums are f32: one term where bf16 holds the value, two for fp16, three for f32.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from hmc.errors import UnsupportedError
from hmc.formats import DTYPE_BITS, GROUP, Format, minifloats
from hmc.formats.micro import E2M1

STEP = 128
"""Columns of a sum that is scaled before it is added up, where no scale covers fewer."""
LEAST = 16
"""Fewest columns of a tensor core's product."""

FLOATS = {"F32": "f32", "F16": "f16", "BF16": "bf16", "F8_E4M3": "e4m3", "F8_E5M2": "e5m2",
          "F8_E8M0": "e8m0"}  # fmt: skip
"""Dtypes of planes that are numbers by themselves, and how kernels call what they are."""
_TERMS = {"f32": 3, "f16": 2}
_WHOLE = 256.0
"""Whole numbers up to this are bf16 numbers."""
_KINDS = {
    "e4m3": minifloats(4, 3, infinities=False),
    "e5m2": minifloats(5, 2, infinities=True),
    "e2m1": E2M1,
    "signed": tuple(float(code - (code & 128) * 2) for code in range(256)),
}
"""Codes that are numbers by their bits, and those numbers."""
_POWERS = {"e4m3": 2.0**8, "e2m1": 2.0**14}
"""By which small floats are larger than the fp16 numbers with their fields."""


@dataclass(frozen=True)
class Scale:
    """A plane of scales, or with `zero` of what is subtracted before: what its elements are (a
    value of `FLOATS`; zeros are whole numbers), and how many rows and columns of the matrix one
    covers (0: all)."""

    kind: str
    rows: int
    columns: int
    zero: bool = False


@dataclass(frozen=True)
class Layout:
    """How kernels read the planes of a weight.

    `bits` of a code; `word` bits are what rows are padded to; `kind` says how a code becomes a
    number: one of `FLOATS`, "e2m1", "signed" (two's complement), "line" (the code plus `values[0]`)
    or "table" (`values[code]`). `terms` bf16 numbers make it up exactly, less its zero where there
    is one. Raises `UnsupportedError` for what tensor cores cannot scale: blocks of fewer than
    `LEAST` columns, or that do not divide `STEP`; and for columns in an order of their own.
    """

    bits: int
    word: int
    kind: str
    values: tuple[float, ...]
    terms: int
    scales: tuple[Scale, ...]

    @staticmethod
    def of(row: Format, dtypes: Sequence[str], group: int = 0) -> Layout:
        """Of a weight whose planes are in memory as `dtypes`, in the order of the row."""
        if row.codes.block[1]:
            raise UnsupportedError(f"{row.name}: kernels of GPUs read no blocks of GGUF")
        scales = []
        for plane, dtype in zip(row.scales, dtypes[1:], strict=True):
            columns = group if plane.columns == GROUP else plane.columns
            if plane.kind == "order":
                raise UnsupportedError(f"{row.name}: kernels of GPUs read no plane of {plane.name}")
            if dtype not in FLOATS or plane.bits:
                raise UnsupportedError(
                    f"{row.name} {plane.name}: no {plane.kind} of kernels is {dtype}"
                )
            scales.append(Scale(FLOATS[dtype], plane.rows, columns, plane.kind == "zero"))
        kind, terms = _kind(row, dtypes[0])
        if any(scale.zero for scale in scales):
            terms = _terms_less_zeros(row)
        values = row.values if kind in ("line", "table") else ()
        found = Layout(row.code_bits, DTYPE_BITS[dtypes[0]], kind, values, terms, tuple(scales))
        if found.bits not in (1, 2, 4, 8, 16, 32) or found.step < LEAST:
            raise UnsupportedError(
                f"{row.name}: codes of {found.bits} bits scaled every {found.step} columns"
            )
        return found

    @property
    def step(self) -> int:
        """Columns after which a sum is scaled: as many as divide every block of scales."""
        return math.gcd(STEP, *(scale.columns for scale in self.scales))

    @property
    def by_step(self) -> bool:
        """Whether scales cover parts of a row: what of them are no zeros."""
        return any(scale.columns and not scale.zero for scale in self.scales)

    @property
    def unit(self) -> int:
        """Bits that are loaded at once and hold whole codes."""
        return max(8, self.bits)

    @property
    def packed(self) -> int:
        """Codes in a unit."""
        return self.unit // self.bits

    @property
    def planes(self) -> int:
        """Codes and scales of a matrix."""
        return 1 + len(self.scales)

    @cached_property
    def power(self) -> float:
        """What sums are to be multiplied by, besides scales: the values of codes are decoded as
        themselves divided by it."""
        return _POWERS.get(self.kind, 1.0)

    def stride(self, columns: int) -> int:
        """Units from one row of codes to the next."""
        return -(-columns * self.bits // self.word) * self.word // self.unit


@lru_cache(1 << 8)
def unread(row: Format, dtypes: tuple[str, ...], group: int) -> str:
    """Why kernels cannot read a weight whose planes are stored as `dtypes`; "" where they can."""
    kept = [plane.in_memory(dtype) for plane, dtype in zip(row.planes, dtypes, strict=True)]
    try:
        Layout.of(row, kept, group)
    except UnsupportedError as error:
        return str(error)
    return ""


def _kind(row: Format, dtype: str) -> tuple[str, int]:
    """How a code becomes a number, and of how many bf16 terms."""
    if not row.values:
        if dtype not in FLOATS or row.codes.bits:
            raise UnsupportedError(f"{row.name}: no codes of kernels are {dtype}")
        return FLOATS[dtype], _TERMS.get(FLOATS[dtype], 1)
    for kind, values in _KINDS.items():
        if _words(row.values) == _words(values):
            return kind, 1
    steps = range(len(row.values))
    whole = row.values == tuple(row.values[0] + step for step in steps)
    return "line" if whole else "table", _terms(row.values)


def _terms_less_zeros(row: Format) -> int:
    """The same of differences from zeros, which are codes' values, or one more: one where they are
    small whole numbers, else an f32's."""
    if not row.values:
        raise UnsupportedError(f"{row.name}: kernels of GPUs subtract no zeros from floats")
    whole = all(value.is_integer() for value in row.values)
    whole = whole and max(row.values) - min(row.values) < _WHOLE
    return 1 if whole else _TERMS["f32"]


def _words(values: Iterable[float]) -> list[bytes]:
    """By which NaN is like NaN, and -0 unlike 0."""
    return [b"nan" if value != value else struct.pack("<d", value) for value in values]


def _terms(values: Iterable[float]) -> int:
    """How many bf16 terms make up every value."""
    most = 1
    for value in values:
        rest, terms = value, 0
        while math.isfinite(rest) and rest:
            rest -= _cut(rest)
            terms += 1
        most = max(most, terms)
    return min(most, 3)


def _cut(value: float) -> float:
    """The bf16 number next to `value` towards zero."""
    (bits,) = struct.unpack("<I", struct.pack("<f", value))
    (found,) = struct.unpack("<f", struct.pack("<I", bits & 0xFFFF0000))
    return float(found)
