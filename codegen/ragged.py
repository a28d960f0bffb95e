"""Whole or part of a vector, told by a count known only at run time: the last rows of a matrix.

Nearly all are whole and take a plain load or store; only the others are masked.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const, lanes_mask, vec


def ceil_div(e: Emitter, value: Value, divisor: Value) -> Value:
    """ceil(value / divisor) of non-negative i64; 0 where the divisor is 0."""
    b = e.b
    divisor = b.select(b.icmp_signed(">", divisor, const(0)), divisor, const(1))
    return b.udiv(b.add(value, b.sub(divisor, const(1))), divisor)


def load_lanes(e: Emitter, base: Value, index: Value, lanes: int, count: Value) -> Value:
    """`<lanes x float>` from element `index`; only `count` (then zeros) where that is less."""
    slot = e.local(vec(F32, lanes))
    with e.b.if_else(e.b.icmp_signed(">=", count, const(lanes))) as (whole, part):
        with whole:
            e.b.store(e.load_vec(base, index, F32, lanes), slot)
        with part:
            pointer = e.b.bitcast(e.at(base, index, F32), vec(F32, lanes).as_pointer())
            values = [pointer, ir.Constant(I32, 1), _mask(e, count, lanes), e.zeros(F32, lanes)]
            found = e.call(f"llvm.masked.load.v{lanes}f32.p0", vec(F32, lanes), *values)
            e.b.store(found, slot)
    return e.b.load(slot)


def store_lanes(e: Emitter, value: Value, base: Value, index: Value, count: Value) -> None:
    """Store `value` (f32 or i16 lanes) at element `index`; only `count` where that is less."""
    kind = value.type
    with e.b.if_else(e.b.icmp_signed(">=", count, const(kind.count))) as (whole, part):
        with whole:
            e.store(value, base, index)
        with part:
            pointer = e.b.bitcast(e.at(base, index, kind.element), kind.as_pointer())
            name = f"llvm.masked.store.v{kind.count}{'i16' if kind.element == I16 else 'f32'}.p0"
            mask = _mask(e, count, kind.count)
            e.call(name, ir.VoidType(), value, pointer, ir.Constant(I32, 1), mask)


def _mask(e: Emitter, count: Value, lanes: int) -> Value:
    """The first `count` lanes."""
    order = lanes_mask(list(range(lanes)))
    return e.b.icmp_signed("<", order, e.splat(e.b.trunc(count, I32), lanes))
