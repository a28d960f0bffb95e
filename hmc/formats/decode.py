"""What stored planes mean: rows of a weight as f32, in numpy. The reference that kernels are tested
against, and what is used where nothing has to be fast.

A weight is `values[code]`, or the code itself where it is a float, less the zero that covers it,
times every scale that covers it, from the first plane to the last, each product rounded to f32.
Where columns lie in an order of their own, they are put back last.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.formats.base import DTYPE_BITS, GROUP, Format, Plane, matrix_of, minifloats
from hmc.formats.blocks import BLOCKS

Array = npt.NDArray[Any]
Floats = npt.NDArray[np.float32]

NUMPY: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32), "F16": np.dtype(np.float16), "BF16": np.dtype(np.uint16),
    "I32": np.dtype(np.uint32), "I64": np.dtype(np.int64),
    "U8": np.dtype(np.uint8), "I8": np.dtype(np.uint8),
    "F8_E4M3": np.dtype(np.uint8),
    "F8_E5M2": np.dtype(np.uint8), "F8_E8M0": np.dtype(np.uint8),
}  # fmt: skip
"""How numpy holds a dtype: floats that it has not as their bits."""

_TABLES = {
    "F8_E4M3": minifloats(4, 3, infinities=False),
    "F8_E5M2": minifloats(5, 2, infinities=True),
    "F8_E8M0": (*(2.0 ** (code - 127) for code in range(255)), float("nan")),
}


def decode(
    row: Format, planes: Sequence[Array], dtypes: Sequence[str], shape: tuple[int, ...],
    group: int = 0, first: int = 0, last: int | None = None,
) -> Floats:  # fmt: skip
    """Rows [first, last) of a weight of `shape` as f32 [n, K].

    `planes` are arrays of `NUMPY[dtype]` (any shape: as many elements as the plane has) in the
    order of the row.
    """
    rows, columns = matrix_of(shape)
    stop = rows if last is None else last
    if row.codes.block[1]:
        return BLOCKS[row.name](planes[0].reshape(rows, -1)[first:stop], columns)
    total = _codes(row, planes[0], dtypes[0], rows, columns, first, stop)
    for kind in ("zero", "scale"):
        for plane, array, dtype in zip(row.scales, planes[1:], dtypes[1:], strict=True):
            if plane.kind == kind:
                spread = _spread(plane, array, dtype, shape, group, first, stop)
                total = total - spread if kind == "zero" else total * spread
    for plane, array in zip(row.scales, planes[1:], strict=True):
        if plane.kind == "order":
            total[:, array.reshape(-1)] = total.copy()
    return total


def floats(array: Array, dtype: str) -> Floats:
    """Elements of a float dtype, as numpy holds it, in f32."""
    if dtype == "BF16":
        return (array.astype(np.uint32) << 16).view(np.float32)
    if dtype in _TABLES:
        return np.asarray(_TABLES[dtype], np.float32)[array]
    found: Floats = array.astype(np.float32)
    return found


def _codes(
    row: Format, array: Array, dtype: str, rows: int, columns: int, first: int, last: int
) -> Floats:
    part = array.reshape(rows, -1)[first:last]
    if not row.values:
        return floats(part, dtype)
    if row.codes.bits:
        shifts = np.arange(0, DTYPE_BITS[dtype], row.codes.bits, dtype=part.dtype)
        part = part[..., None] >> shifts & part.dtype.type(2**row.codes.bits - 1)
        part = part.reshape(len(part), -1)[:, :columns]
    return np.asarray(row.values, np.float32)[part]


def _spread(
    plane: Plane, array: Array, dtype: str, shape: tuple[int, ...], group: int, first: int,
    last: int,
) -> Floats:  # fmt: skip
    rows, columns = matrix_of(shape)
    down, across = plane.elements(shape, group)
    numbers = floats(array.reshape(down, across), dtype)
    wide = (group if plane.columns == GROUP else plane.columns) or columns
    picked = numbers[np.arange(first, last) // (plane.rows or rows)]
    return picked[:, np.arange(columns) // wide]
