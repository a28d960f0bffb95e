"""Compressed rows: how they are made of the tokens of their windows, and where they lie.

A column's softmax over a window runs along with the tokens: maximum, sum and weighted sum are kept
between calls, so rows do not depend on how a prompt is cut. The last token of a window writes the
mean; a second record norms it, turns it (neither for keys of pools), and puts it into the page of
that token.
"""

from __future__ import annotations

from math import gcd

from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const
from hmc.codegen.kernels.pointwise.norm import WAYS, Sum
from hmc.codegen.kernels.pointwise.rotary import rotate_pairs
from hmc.codegen.vector import copy_row, exp, fmax, for_strips, fsplat, load_f32, store_f32

NEVER = float("-inf")


class RowPages:
    """Where the rows of a token's sequence lie in pages: argument `rows`, bf16 [pages, block /
    gcd(block, ratio), width].
    """

    def __init__(self, e: Emitter, token: Value, width: int) -> None:
        b = e.b
        self.e, self.width = e, width
        self.ratio, self.block = e.spec["ratio"], e.spec["block"]
        self.unit = gcd(self.ratio, self.block)
        row = b.mul(e.load_int(e.arg["sequence"], token), e.arg["table_stride"])
        self._table = e.at(e.arg["tables"], row, I32)

    def of(self, base: Value, number: Value) -> Value:
        """Address (i16*) of the row of a window, at `base`."""
        e, b = self.e, self.e.b
        last = b.sub(b.mul(b.add(number, const(1)), const(self.ratio)), const(1))
        page = e.load_int(self._table, b.udiv(last, const(self.block)))
        slot = b.udiv(b.urem(last, const(self.block)), const(self.unit))
        index = b.add(b.mul(page, const(self.block // self.unit)), slot)
        return e.at(base, b.mul(index, const(self.width)), I16)


class _Softmax:
    """A running softmax of a strip of columns: `field` numbers the first of its three in the state
    of a sequence.
    """

    def __init__(self, e: Emitter, state: Value, field: int, index: Value, count: int) -> None:
        self.e, self.state, self.field = e, state, field
        self.index, self.count = index, count

    def _place(self, number: int) -> Value:
        return self.e.b.add(self.index, const((self.field + number) * self.e.spec["width"]))

    def load(self) -> tuple[Value, ...]:
        """Maximum, sum and weighted sum."""
        e = self.e
        return tuple(
            load_f32(e, "f32", self.state, self._place(number), self.count) for number in range(3)
        )

    def store(self, values: tuple[Value, ...]) -> None:
        """Keep them."""
        for number, value in enumerate(values):
            store_f32(self.e, "f32", value, self.state, self._place(number), self.count)

    def add(self, fresh: Value, gate: Value, value: Value) -> tuple[Value, ...]:
        """With one token more, which begins a window where `fresh` (i1)."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        never, nothing = fsplat(NEVER, lanes), fsplat(0.0, lanes)
        old, total, mean = self.load()
        old = b.select(fresh, never, old)
        total, mean = (b.select(fresh, nothing, each) for each in (total, mean))
        top = fmax(e, old, gate)
        kept, new = exp(e, b.fsub(old, top)), exp(e, b.fsub(gate, top))
        made = top, e.fma(total, kept, new), e.fma(mean, kept, b.fmul(new, value))
        self.store(made)
        return made


def _merged(e: Emitter, one: tuple[Value, ...], other: tuple[Value, ...]) -> tuple[Value, Value]:
    """Sum and weighted sum of two softmaxes together."""
    b, top = e.b, fmax(e, one[0], other[0])
    first, second = (exp(e, b.fsub(each[0], top)) for each in (one, other))
    total, mean = (e.fma(one[number], first, b.fmul(other[number], second)) for number in (1, 2))
    return total, mean


def emit_compress(e: Emitter) -> None:
    """`compress`: split by strips of columns; a worker takes the tokens in order."""
    b, width = e.b, e.spec["width"]
    whole = width // e.lanes
    start, stop = e.split(const(-(-width // e.lanes)))

    def strip(index: Value, count: int) -> None:
        with e.for_range(0, e.arg["tokens"]) as token:
            position = e.load_int(e.arg["positions"], token)
            with b.if_then(b.icmp_signed(">=", position, const(0))):
                _token(e, token, position, index, count)

    with e.for_range(start, stop) as number:
        index = b.mul(number, const(e.lanes))
        short = b.icmp_signed("==", number, const(whole))
        if whole:
            with b.if_then(b.not_(short)):
                strip(index, e.lanes)
        if width % e.lanes:
            with b.if_then(short):
                strip(index, width % e.lanes)


def _token(e: Emitter, token: Value, position: Value, index: Value, count: int) -> None:
    b, spec = e.b, e.spec
    width, ratio, overlap = spec["width"], spec["ratio"], spec["overlap"]
    place = b.urem(position, const(ratio))
    fresh = b.icmp_signed("==", place, const(0))
    ends = b.icmp_signed("==", place, const(ratio - 1))
    slot = e.load_int(e.arg["sequence"], token)
    state = e.at(e.arg["state"], b.mul(slot, e.arg["state_stride"]), F32)
    bias = e.at(e.arg["ape"], b.mul(place, const(width * (1 + overlap))), F32)

    def added(field: int, column: int) -> tuple[Value, ...]:
        at = b.add(index, const(column))
        gate = load_f32(e, "f32", e.row("gate", token), at, count)
        gate = b.fadd(gate, load_f32(e, "f32", bias, at, count))
        value = load_f32(e, "f32", e.row("kv", token), at, count)
        return _Softmax(e, state, field, index, count).add(fresh, gate, value)

    own = added(0, width if overlap else 0)
    following = added(3, 0) if overlap else None
    with b.if_then(ends):
        total, mean = own[1:]
        if following is not None:
            before = _Softmax(e, state, 6, index, count)
            both = _merged(e, before.load(), own)
            first = b.icmp_signed("<", position, const(ratio))
            total, mean = (
                b.select(first, alone, each)
                for alone, each in zip((total, mean), both, strict=True)
            )
            before.store(following)
        target = e.at(e.arg["pooled"], b.mul(token, const(width)), F32)
        store_f32(e, "f32", b.fdiv(mean, total), target, index, count)


def emit_compress_rows(e: Emitter) -> None:
    """`compress_rows`: split by token; those that end a window write its row."""
    b, spec = e.b, e.spec
    width, ratio, dim = spec["width"], spec["ratio"], spec.get("rope_dim")
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        after = b.add(e.load_int(e.arg["positions"], token), const(1))
        ended = b.sdiv(e.positive(after), const(ratio))
        e.store_int(b.sub(ended, const(1)), e.arg["lasts"], token)
        whole = b.icmp_signed("==", b.urem(after, const(ratio)), const(0))
        with b.if_then(b.and_(whole, b.icmp_signed(">", after, const(0)))):
            x = e.at(e.arg["pooled"], b.mul(token, const(width)), F32)
            if dim:
                _norm(e, x, width)
                angles = b.mul(b.sub(after, const(ratio)), const(dim // 2))
                cos, sin = (e.at(e.arg[name], angles, F32) for name in ("cos", "sin"))
                rotate_pairs(e, e.at(x, const(width - dim), F32), cos, sin, dim)
            target = RowPages(e, token, width).of(e.arg["rows"], b.sub(ended, const(1)))
            copy_row(e, "f32", x, "bf16", target, width, 2)


def _norm(e: Emitter, x: Value, width: int) -> None:
    """RMS norm in place, times gamma."""
    squares = Sum(e)

    def square(index: Value, count: int, way: int) -> None:
        squares.add_square(load_f32(e, "f32", x, index, count), way)

    for_strips(e, width, e.lanes, square, WAYS)
    factor = e.splat(squares.inverse_root(width), e.lanes)

    def scale(index: Value, count: int, way: int) -> None:
        value = e.b.fmul(load_f32(e, "f32", x, index, count), factor)
        value = e.b.fmul(value, load_f32(e, "f32", e.arg["gamma"], index, count))
        store_f32(e, "f32", value, x, index, count)

    for_strips(e, width, e.lanes, scale, WAYS)
