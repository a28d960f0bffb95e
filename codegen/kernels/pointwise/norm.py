"""RMS norm, alone or behind a residual addition, and the addition alone; rows are f32.

Two passes over a row, the second out of the first-level cache; sums of squares in four vector
accumulators. A token (or one group of it) is never shared between workers, so results do not depend
on their number.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce

from hmc.codegen.ir import F32, I64, Emitter, Value, const, fconst
from hmc.codegen.vector import for_strips, load_f32, place, sqrt, store_f32

WAYS = 4


class Sum:
    """A sum over a row, collected in `WAYS` vectors."""

    def __init__(self, e: Emitter) -> None:
        self._e = e
        zero = e.zeros(F32, e.lanes)
        self._slots = [e.local(zero.type, zero) for _ in range(WAYS)]

    def add(self, value: Value, way: int) -> None:
        """Add `value`'s lanes."""
        slot = self._slots[way]
        self._e.b.store(self._e.b.fadd(self._e.b.load(slot), value), slot)

    def add_square(self, value: Value, way: int) -> None:
        """Add the squares of `value`'s lanes."""
        slot = self._slots[way]
        self._e.b.store(self._e.fma(value, value, self._e.b.load(slot)), slot)

    def total(self) -> Value:
        """The sum, f32."""
        b = self._e.b
        one, two, three, four = (b.load(slot) for slot in self._slots)
        return self._e.reduce_add(b.fadd(b.fadd(one, two), b.fadd(three, four)))

    def inverse_root(self, width: int) -> Value:
        """1 / sqrt(sum / width + eps), f32."""
        e, b = self._e, self._e.b
        mean = b.fdiv(self.total(), fconst(float(width)))
        return b.fdiv(fconst(1.0), sqrt(e, b.fadd(mean, e.arg["eps"])))


def scale_row(e: Emitter, width: int, x: Value, factor: Value, y: Value, out: str) -> None:
    """y[:] = x[:] * factor * gamma[:], y in format `out`, gamma in `spec.weight`; x and y are row
    pointers.
    """
    scale = e.splat(factor, e.lanes)

    def strip(index: Value, count: int, way: int) -> None:
        value = e.b.fmul(load_f32(e, "f32", x, index, count), scale)
        value = e.b.fmul(value, load_f32(e, e.spec.weight, e.arg["gamma"], index, count))
        store_f32(e, out, value, y, index, count)

    for_strips(e, width, e.lanes, strip, WAYS)


def norm_row(e: Emitter, width: int, x: Value, y: Value, out: str) -> None:
    """The norm of the row at x to y, which may be x."""
    squares = Sum(e)

    def strip(index: Value, count: int, way: int) -> None:
        squares.add_square(load_f32(e, "f32", x, index, count), way)

    for_strips(e, width, e.lanes, strip, WAYS)
    scale_row(e, width, x, squares.inverse_root(width), y, out)


def emit_norm(e: Emitter) -> None:
    """`norm`: split by (token, group)."""
    b, width, groups = e.b, e.spec["width"], e.arg["groups"]
    start, stop = e.split(b.mul(e.arg["tokens"], groups))
    with e.for_range(start, stop) as item:
        token, column = b.sdiv(item, groups), b.mul(b.srem(item, groups), const(width))
        x = e.at(e.arg["x"], b.add(b.mul(token, e.arg["x_stride"]), column), F32)
        index = b.add(b.mul(token, e.arg["y_stride"]), column)
        norm_row(e, width, x, place(e, e.spec.out, e.arg["y"], index), e.spec.out)


def _for_sums(e: Emitter, out: str, then: Callable[[Value, Value, Sum], None]) -> None:
    """For each of this worker's tokens: `out` row = h + d0 (+ d1); then `then(token, out row,
    squares)`.
    """
    b = e.b
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        h, d0, target = (e.row(name, token) for name in ("h", "d0", out))
        squares = Sum(e)

        def strips(*rows: Value) -> None:
            def strip(index: Value, count: int, way: int) -> None:
                values = (load_f32(e, "f32", row, index, count) for row in rows)
                total = reduce(b.fadd, values)
                store_f32(e, "f32", total, target, index, count)
                squares.add_square(total, way)

            for_strips(e, e.spec["width"], e.lanes, strip, WAYS)

        present = b.icmp_unsigned("!=", b.ptrtoint(e.arg["d1"], I64), const(0))
        with b.if_else(present) as (both, single):
            with both:
                strips(h, d0, e.row("d1", token))
            with single:
                strips(h, d0)
        then(token, target, squares)


def emit_add_norm(e: Emitter) -> None:
    """`add_norm`: split by token."""
    width, out = e.spec["width"], e.spec.out

    def then(token: Value, h_out: Value, squares: Sum) -> None:
        factor = squares.inverse_root(width)
        y = place(e, out, e.arg["y"], e.b.mul(token, e.arg["y_stride"]))
        scale_row(e, width, h_out, factor, y, out)

    _for_sums(e, "h_out", then)


def emit_add(e: Emitter) -> None:
    """`add`: split by token."""
    _for_sums(e, "y", lambda token, target, squares: None)
