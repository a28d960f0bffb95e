"""What codes are worth as f32, in vectors and in order, by what the format's row says of them.

Floats are converted, whole numbers too; of 4 bits a code is an index into a register, where values
of the upper half are those of the lower one with their sign changed one of 8 lanes will do. For all
others there is a look-up a code in memory.
"""

from __future__ import annotations

import math

from llvmlite import ir

from hmc.codegen.formats.lookup import codes_of, looked_up
from hmc.codegen.formats.planes import number
from hmc.codegen.ir import F16, F32, I8, I16, I32, Emitter, Value, const, fconst, lanes_mask, vec
from hmc.codegen.native import SIGNED, is_line
from hmc.codegen.vector import isplat, masked_vec
from hmc.formats import Format

_FLOATS = {"F32": F32, "F16": F16, "BF16": I16, "F8_E4M3": I8, "F8_E5M2": I8}
"""Codes that are floats: how they are loaded."""


def codes_f32(
    e: Emitter, row: Format, base: Value, k: Value, count: int, padded: bool = False
) -> Value:
    """`<lanes x float>`: what `count` (or as many as there are lanes) codes of the row at `base`
    (i8*) from element `k` (i64) on are worth; behind them zeros, or where they may be `padded`
    anything.
    """
    count = min(count, e.lanes)
    (dtype,) = row.codes.dtypes
    if dtype in _FLOATS:
        return number(e, dtype, masked_vec(e, base, k, _FLOATS[dtype], e.lanes, count))
    if row.code_bits == 2:
        return _table(e, row, base, k, count)
    codes = (_nibbles if row.code_bits == 4 else _bytes)(e, row, base, k, count)
    value = _values(e, row, codes)
    if value is None:
        return _table(e, row, base, k, count)
    if padded or count == e.lanes:
        return value
    lanes = [lane if lane < count else e.lanes for lane in range(e.lanes)]
    return e.b.shuffle_vector(value, e.zeros(F32, e.lanes), lanes_mask(lanes))


def _table(e: Emitter, row: Format, base: Value, k: Value, count: int) -> Value:
    each = 8 // row.code_bits
    start = e.offset(base, e.b.udiv(k, const(each)))
    packed = masked_vec(e, start, const(0), I8, e.lanes // each, -(-count // each))
    return looked_up(e, row.name, row.values, codes_of(e, packed, row.code_bits, count))


def _bytes(e: Emitter, row: Format, base: Value, k: Value, count: int) -> Value:
    """Codes of a byte, as i32."""
    return e.b.zext(masked_vec(e, base, k, I8, e.lanes, count), vec(I32, e.lanes))


def _nibbles(e: Emitter, row: Format, base: Value, k: Value, count: int) -> Value:
    """Codes of 4 bits, as i32; what lies above them is anything."""
    b, lanes = e.b, e.lanes
    if row.codes.dtypes == ("I32",):
        words = masked_vec(e, base, b.lshr(k, const(3)), I32, lanes // 8, -(-count // 8))
        order, each = [lane // 8 for lane in range(lanes)], 8
    else:
        packed = masked_vec(e, base, b.lshr(k, const(1)), I8, lanes // 2, -(-count // 2))
        words = b.zext(packed, vec(I32, lanes // 2))
        order, each = [lane // 2 for lane in range(lanes)], 2
    shifts = lanes_mask([4 * (lane % each) for lane in range(lanes)])
    spread = b.lshr(b.shuffle_vector(words, words, lanes_mask(order)), shifts)
    return b.and_(spread, isplat(15, lanes))


def _values(e: Emitter, row: Format, codes: Value) -> Value | None:
    """What codes `<lanes x i32>` are worth; None where it takes a table in memory."""
    b, lanes, kind = e.b, e.lanes, vec(F32, e.lanes)
    if is_line(row.values):
        return b.sitofp(b.add(codes, isplat(int(row.values[0]), lanes)), kind)
    if row.code_bits == 8:
        if row.values == SIGNED:
            moved = b.shl(codes, isplat(24, lanes))
            return b.sitofp(b.ashr(moved, isplat(24, lanes)), kind)
        return None
    if lanes == 16:
        table = ir.Constant(kind, [fconst(value) for value in row.values])
        return e.call("llvm.x86.avx512.permvar.sf.512", kind, table, codes)
    if any(
        high != -low or math.copysign(1, high) == math.copysign(1, low)
        for low, high in zip(row.values[:8], row.values[8:], strict=True)
    ):
        return None
    table = ir.Constant(kind, [fconst(value) for value in row.values[:8]])
    size = e.call("llvm.x86.avx2.permps", kind, table, codes)
    sign = b.shl(b.lshr(codes, isplat(3, lanes)), isplat(31, lanes))
    return b.bitcast(b.or_(b.bitcast(size, codes.type), sign), kind)
