"""Codes to f32 by a table in memory, one load each: for any codes and any values."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from llvmlite import ir

from hmc.codegen.ir import F32, I8, I32, I64, Emitter, Value


def codes_of(e: Emitter, packed: Value, bits: int, count: int) -> list[Value]:
    """The first `count` codes (i8) of bytes, the first of each in its lowest bits."""
    b, each, found = e.b, 8 // bits, []
    for lane in range(count):
        code = b.extract_element(packed, ir.Constant(I32, lane // each))
        if each > 1:
            code = b.lshr(code, ir.Constant(I8, lane % each * bits))
            code = b.and_(code, ir.Constant(I8, 2**bits - 1))
        found.append(code)
    return found


def looked_up(e: Emitter, name: str, values: Sequence[float], codes: Sequence[Value]) -> Value:
    """A vector of the tier of `values[code]`, one load each; zeros behind them."""
    table, found = _table(e, name, values), e.zeros(F32, e.lanes)
    for lane, code in enumerate(codes):
        value = e.load(table, e.b.zext(code, I64), F32, align=4)
        found = e.b.insert_element(found, value, ir.Constant(I32, lane))
    return found


def _table(e: Emitter, name: str, values: Sequence[float]) -> Value:
    """i8* of the f32 values of every code."""
    name = f"values_{name}"
    known = e.module.globals.get(name)
    if known is None:
        bits = struct.unpack(f"{len(values)}I", struct.pack(f"{len(values)}f", *values))
        kind = ir.ArrayType(I32, len(bits))
        known = ir.GlobalVariable(e.module, kind, name)
        known.linkage, known.global_constant, known.align = "private", True, 64
        known.initializer = ir.Constant(kind, [ir.Constant(I32, each) for each in bits])
    return e.b.bitcast(known, I8.as_pointer())
