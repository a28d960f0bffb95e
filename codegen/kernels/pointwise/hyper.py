"""Hyper-connections: the weights of a token's streams, and mixtures of the streams by them.

A token's weights are computed by one worker, a matrix of n x n as n vectors of n lanes. Mixtures
are split into pieces of rows.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from hmc.codegen.ir import F32, Emitter, Value, const, vec
from hmc.codegen.vector import copy_row, exp, fmax, for_strips, load_f32, sigmoid, store_f32

_PIECE = 512
"""Columns that one worker takes at least."""


class _Weights:
    """Code for the weights of one token."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.n = e, e.spec["streams"]
        self.eps = e.splat(e.arg["eps"], self.n)

    def linear(self, x: Value, kind: int, first: int) -> Value:
        """mixes * scale + base of n columns from `first` on."""
        e, n, at = self.e, self.n, const(first)
        scale = e.splat(e.load(e.arg["scale"], const(kind), F32), n)
        base = e.load_vec(e.arg["base"], at, F32, n, align=4)
        return e.fma(e.load_vec(x, at, F32, n, align=4), scale, base)

    def softmax(self, row: Value) -> Value:
        """Softmax of a row + eps."""
        e, b, n = self.e, self.e.b, self.n
        top = e.splat(e.reduce(row, partial(fmax, e)), n)
        raised = exp(e, b.fsub(row, top))
        return b.fadd(b.fdiv(raised, e.splat(e.reduce_add(raised), n)), self.eps)

    def by_columns(self, rows: list[Value]) -> list[Value]:
        """Each element divided by the sum of its column + eps."""
        b, total = self.e.b, self.eps
        for row in rows:
            total = b.fadd(total, row)
        return [b.fdiv(row, total) for row in rows]

    def by_rows(self, rows: list[Value]) -> list[Value]:
        """The same by rows."""
        e, b = self.e, self.e.b
        sums = (b.fadd(e.splat(e.reduce_add(row), self.n), self.eps) for row in rows)
        return [b.fdiv(row, total) for row, total in zip(rows, sums, strict=True)]

    def emit(self, token: Value) -> None:
        """Code for a token's row."""
        e, b, n = self.e, self.e.b, self.n
        x, y = e.row("mixes", token), e.row("y", token)
        e.store(b.fadd(sigmoid(e, self.linear(x, 0, 0)), self.eps), y, const(0), align=4)
        if e.spec["parts"] == 1:
            return
        post, magnitude = sigmoid(e, self.linear(x, 1, n)), e.splat(e.arg["magnitude"], n)
        if e.spec["parts"] == 2:
            e.store(e.fma(post, magnitude, self.eps), y, const(n), align=4)
            return
        e.store(b.fmul(post, magnitude), y, const(n), align=4)
        rows = [self.softmax(self.linear(x, 2, (2 + row) * n)) for row in range(n)]
        slots = [e.local(vec(F32, n), row) for row in self.by_columns(rows)]
        with e.for_range(1, e.spec["iterations"]):
            turned = self.by_columns(self.by_rows([b.load(slot) for slot in slots]))
            for slot, row in zip(slots, turned, strict=True):
                b.store(row, slot)
        for number, slot in enumerate(slots):
            e.store(b.load(slot), y, const((2 + number) * n), align=4)


def emit_hyper_weights(e: Emitter) -> None:
    """`hyper_weights`: split by token."""
    weights = _Weights(e)
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        weights.emit(token)


def emit_hyper_in(e: Emitter) -> None:
    """`hyper_in`: split by (token, piece of its columns)."""
    width, n = e.spec["width"], e.spec["streams"]

    def piece(token: Value, first: Value, size: int) -> None:
        weights = e.row("weights", token)
        shares = [e.splat(e.load(weights, const(j), F32), e.lanes) for j in range(n)]
        streams = [e.at(e.row("h", token, const(j), width), first, F32) for j in range(n)]
        target = e.at(e.row("y", token), first, F32)

        def strip(index: Value, count: int, way: int) -> None:
            total = e.zeros(F32, e.lanes)
            for share, stream in zip(shares, streams, strict=True):
                total = e.fma(share, load_f32(e, "f32", stream, index, count), total)
            store_f32(e, "f32", total, target, index, count)

        for_strips(e, size, e.lanes, strip)

    _pieces(e, piece)


def emit_hyper_out(e: Emitter) -> None:
    """`hyper_out`: split by (token, piece of its columns), all streams of which a worker writes."""
    b, width, n = e.b, e.spec["width"], e.spec["streams"]
    mixed = e.spec["parts"] > 2

    def piece(token: Value, first: Value, size: int) -> None:
        weights = e.row("weights", token)
        streams = [e.at(e.row("h", token, const(j), width), first, F32) for j in range(n)]
        targets = [e.at(e.row("y", token, const(k), width), first, F32) for k in range(n)]
        x = e.at(e.row("x", token), first, F32)

        def share(number: int) -> Value:
            return e.splat(e.load(weights, const(number), F32), e.lanes)

        def strip(index: Value, count: int, way: int) -> None:
            new = load_f32(e, "f32", x, index, count)
            old = [load_f32(e, "f32", stream, index, count) for stream in streams]
            for k, target in enumerate(targets):
                if mixed:
                    total = b.fmul(share(n + k), new)
                    for j, value in enumerate(old):
                        total = e.fma(share((2 + j) * n + k), value, total)
                else:
                    total = e.fma(share(n + k), new, old[k])
                store_f32(e, "f32", total, target, index, count)

        for_strips(e, size, e.lanes, strip)

    _pieces(e, piece)


def emit_hyper_copy(e: Emitter) -> None:
    """`hyper_copy`: split by (token, stream)."""
    b, width, n = e.b, e.spec["width"], e.spec["streams"]
    start, stop = e.split(b.mul(e.arg["tokens"], const(n)))
    with e.for_range(start, stop) as item:
        token, stream = b.udiv(item, const(n)), b.urem(item, const(n))
        target = e.row("y", token, stream, width)
        copy_row(e, "f32", e.row("x", token), "f32", target, width, 4)


def _pieces(e: Emitter, piece: Callable[[Value, Value, int], None]) -> None:
    """`piece(token, first column, columns)` for this worker's share; the last piece of a row may be
    shorter.
    """
    b, width = e.b, e.spec["width"]
    whole, rest = divmod(width, _PIECE)
    count = const(whole + bool(rest))
    start, stop = e.split(b.mul(e.arg["tokens"], count))
    with e.for_range(start, stop) as item:
        token, number = b.udiv(item, count), b.urem(item, count)
        first = b.mul(number, const(_PIECE))
        short = b.icmp_signed("==", number, const(whole))
        if whole:
            with b.if_then(b.not_(short)):
                piece(token, first, _PIECE)
        if rest:
            with b.if_then(short):
                piece(token, first, rest)
