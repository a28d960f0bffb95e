"""The table of weight formats, and the way to one more.

Kernels for a format are in codegen/formats: native ones where its table names them, else those that
are made from the format's planes. So a row that is registered works at once, everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

from hmc.errors import UnsupportedError
from hmc.formats.base import Format
from hmc.formats.fp8 import FP8, FP8_32, FP8_CHANNEL, FP8_GROUP, FP8_ROWS, FP8_TENSOR, MXFP8
from hmc.formats.gguf import GGUF
from hmc.formats.micro import MXFP4, MXFP4_I8, NVFP4, NVFP4_TIMES
from hmc.formats.plain import BF16, F32, FP16, I64
from hmc.formats.whole import (
    AWQ,
    GPTQ,
    GPTQ2,
    GPTQ2_8,
    GPTQ2_8_ORDER,
    GPTQ2_ORDER,
    GPTQ8,
    GPTQ8_ORDER,
    GPTQ_ORDER,
    INT4,
    INT4_ZERO,
    INT8,
    INT8_GROUP,
    INT8_PACKED,
    INT8_PACKED_ZERO,
    INT8_ZERO,
)

_ROWS: dict[str, Format] = {
    row.name: row
    for row in (
        *(FP8, BF16, FP16, F32, I64, INT4),
        *(FP8_32, FP8_TENSOR, FP8_CHANNEL, MXFP8, FP8_GROUP, *FP8_ROWS),
        *(MXFP4, MXFP4_I8, NVFP4, NVFP4_TIMES),
        *(INT4_ZERO, INT8, INT8_PACKED, INT8_GROUP, INT8_ZERO, INT8_PACKED_ZERO, AWQ),
        *(GPTQ, GPTQ2, GPTQ_ORDER, GPTQ2_ORDER),
        *(GPTQ8, GPTQ8_ORDER, GPTQ2_8, GPTQ2_8_ORDER),
        *GGUF,
    )
}

FORMATS: Mapping[str, Format] = MappingProxyType(_ROWS)
"""Every format by its name."""


def told_by_dtype() -> dict[str, Format]:
    """The formats of one plane, which the dtype of a tensor tells, by that."""
    return {dtype: row for row in _ROWS.values() if not row.scales for dtype in row.codes.dtypes}


_BUILT_IN = frozenset(_ROWS) | {""}


def is_built_in(name: str) -> bool:
    """Whether every process knows a format ("": none), not only one that `register`ed it."""
    return name in _BUILT_IN


def register(row: Format) -> None:
    """Add a format for the life of this process; `ValueError` for a name that is taken by another
    row.
    """
    if _ROWS.setdefault(row.name, row) != row:
        raise ValueError(f"there is a weight format {row.name} already")


@contextmanager
def registered(*rows: Format) -> Iterator[None]:
    """`register` for a while."""
    new = [row.name for row in rows if row.name not in _ROWS]
    for row in rows:
        register(row)
    try:
        yield
    finally:
        for name in new:
            del _ROWS[name]


def format_of(name: str) -> Format:
    """The row of a format; `UnsupportedError` for a name without one."""
    if name not in _ROWS:
        raise UnsupportedError(f"weight format {name!r}: there are {', '.join(_ROWS)}")
    return _ROWS[name]
