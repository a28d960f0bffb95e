"""Exact decode of stored weights to f32 vectors, in order: of formats with native decoders without
their scales, which belong to the accumulators; of all others with them (made.py).
"""

from __future__ import annotations

from collections.abc import Callable

from hmc.codegen.formats.made import made_f32
from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.values import codes_f32
from hmc.codegen.ir import Emitter, Value, const
from hmc.codegen.native import is_native
from hmc.codegen.spec import KernelSpec, WeightFormat
from hmc.formats import format_of


def row_bytes(weight_format: WeightFormat, k: int) -> int:
    """Bytes of one stored row of `k` weights; packed codes fill whole words."""
    return format_of(weight_format).row_bytes(k)


def span_bytes(weight_format: WeightFormat, columns: int) -> int:
    """Bytes of so many weights within a row, of blocks as many as fall to them."""
    width, size = format_of(weight_format).codes.block
    return -(-columns * size // width) if size else row_bytes(weight_format, columns)


def weights_f32(e: Emitter, spec: KernelSpec, row: Row, index: Value, count: int) -> list[Value]:
    """`count` consecutive weights of `row` from element `index` (i64) on, as f32.

    Returns ceil(count / lanes) vectors of the tier's width in memory order. Lanes past `count` are
    zero and nothing past element `index + count` is read, but for what fills its word up. NaN codes
    give NaN. Packed codes: `index` must be at a word, and the last lanes of native ones are what a
    zero or padding behind the row is worth, not zero.
    """
    if not is_native(spec):
        return _vectors(e, index, count, lambda at, valid: made_f32(e, spec, row, at, valid))
    kind = format_of(spec.weight)
    return _vectors(
        e, index, count, lambda at, valid: codes_f32(e, kind, row.codes, at, valid, padded=True)
    )


def _vectors(
    e: Emitter, index: Value, count: int, decode: Callable[[Value, int], Value]
) -> list[Value]:
    return [
        decode(e.b.add(index, const(start)), count - start) for start in range(0, count, e.lanes)
    ]
