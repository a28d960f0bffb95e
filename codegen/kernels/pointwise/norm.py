"""RMS norm, alone or behind a residual addition, and the addition alone; rows are f32.

Two passes over a row, the second out of the first-level cache; sums of squares in four vector
accumulators. A token (or one group of it) is never shared between workers, so results do not depend
on their number.
"""

from __future__ import annotations

from typing import Any

from hmc.codegen import vector
from hmc.codegen.ir import F32, Emitter, Value, const, fconst
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec

_WAYS = 4


class SquareSum:
    """Sum of squares of a row, collected in `_WAYS` vectors."""

    def __init__(self, e: Emitter, lanes: int) -> None:
        self._e = e
        zero = e.zeros(F32, lanes)
        self._slots = [e.local(zero.type, zero) for _ in range(_WAYS)]

    def add(self, value: Value, way: int) -> None:
        """Add the squares of `value`'s lanes."""
        slot = self._slots[way]
        self._e.b.store(self._e.fma(value, value, self._e.b.load(slot)), slot)

    def inverse_root(self, width: int, eps: Value) -> Value:
        """1 / sqrt(sum / width + eps), f32."""
        b = self._e.b
        one, two, three, four = (b.load(slot) for slot in self._slots)
        total = self._e.reduce_add(b.fadd(b.fadd(one, two), b.fadd(three, four)))
        mean = b.fdiv(total, fconst(float(width)))
        return b.fdiv(fconst(1.0), vector.sqrt(self._e, b.fadd(mean, eps)))


def scale_row(
    e: Emitter, lanes: int, width: int, x: Value, factor: Value, gamma: Value, y: Value
) -> None:
    """y[:] = x[:] * factor * gamma[:], y in `spec.out`, gamma in `spec.weight`; x and y are row
    pointers.
    """
    scale = e.splat(factor, lanes)

    def strip(index: Value, count: int, way: int) -> None:
        value = e.b.fmul(vector.load_f32(e, "f32", x, index, count, lanes), scale)
        value = e.b.fmul(value, vector.load_f32(e, e.spec.weight, gamma, index, count, lanes))
        vector.store_f32(e, e.spec.out, value, y, index, count)

    vector.for_strips(e, width, lanes, strip, _WAYS)


def emit_norm(spec: KernelSpec) -> str:
    """`norm`: split by (token, group)."""
    e = Emitter(spec)
    lanes, width, b = TIERS[spec.isa].lanes, spec["width"], e.b
    groups = e.arg["groups"]
    size = vector.width_of(spec.out)
    start, stop = e.split(b.mul(e.arg["tokens"], groups))
    with e.for_range(start, stop) as item:
        token, column = b.sdiv(item, groups), b.mul(b.srem(item, groups), const(width))
        x = e.at(e.arg["x"], b.add(b.mul(token, e.arg["x_stride"]), column), F32)
        y_index = b.add(b.mul(token, e.arg["y_stride"]), column)
        y = e.offset(e.arg["y"], b.mul(y_index, const(size)))
        squares = SquareSum(e, lanes)

        def strip(index: Value, count: int, way: int, x: Value = x, s: SquareSum = squares) -> None:
            s.add(vector.load_f32(e, "f32", x, index, count, lanes), way)

        vector.for_strips(e, width, lanes, strip, _WAYS)
        factor = squares.inverse_root(width, e.arg["eps"])
        scale_row(e, lanes, width, x, factor, e.arg["gamma"], y)
    return e.finish()


def _for_sums(e: Emitter, out: str, then: Any) -> None:
    """For each of this worker's tokens: `out` row = h + d0 (+ d1); then `then(token, out row,
    squares)`.
    """
    b, lanes, width = e.b, TIERS[e.spec.isa].lanes, e.spec["width"]

    def row(name: str, token: Value) -> Value:
        return e.at(e.arg[name], b.mul(token, e.arg[f"{name}_stride"]), F32)

    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        h, d0, target = row("h", token), row("d0", token), row(out, token)
        squares = SquareSum(e, lanes)

        def strips(second: Value | None) -> None:
            def strip(index: Value, count: int, way: int) -> None:
                total = b.fadd(
                    vector.load_f32(e, "f32", h, index, count, lanes),
                    vector.load_f32(e, "f32", d0, index, count, lanes),
                )
                if second is not None:
                    total = b.fadd(total, vector.load_f32(e, "f32", second, index, count, lanes))
                vector.store_f32(e, "f32", total, target, index, count)
                squares.add(total, way)

            vector.for_strips(e, width, lanes, strip, _WAYS)

        present = b.icmp_unsigned("!=", b.ptrtoint(e.arg["d1"], const(0).type), const(0))
        with b.if_else(present) as (both, single):
            with both:
                strips(row("d1", token))
            with single:
                strips(None)
        then(token, target, squares)


def emit_add_norm(spec: KernelSpec) -> str:
    """`add_norm`: split by token."""
    e = Emitter(spec)
    lanes, width, size = TIERS[spec.isa].lanes, spec["width"], vector.width_of(spec.out)

    def then(token: Value, h_out: Value, squares: SquareSum) -> None:
        factor = squares.inverse_root(width, e.arg["eps"])
        y_bytes = e.b.mul(e.b.mul(token, e.arg["y_stride"]), const(size))
        y = e.offset(e.arg["y"], y_bytes)
        scale_row(e, lanes, width, h_out, factor, e.arg["gamma"], y)

    _for_sums(e, "h_out", then)
    return e.finish()


def emit_add(spec: KernelSpec) -> str:
    """`add`: split by token."""
    e = Emitter(spec)
    _for_sums(e, "y", lambda token, target, squares: None)
    return e.finish()
