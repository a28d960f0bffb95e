"""A matmul of which only the largest results are wanted: `screen` multiplies the compact copy of a
matrix, `screen_tops` finds lower bounds, `screen_rows` computes the rows whose upper bound reaches
the k-th best of them, to the bit as `linear` does, and makes -inf of all others. `screen_copy`
makes the compact copy.

The bound. Of a row w, its copy c and a token's bf16 activations x of n columns, in exact numbers
w . x - c . x = (w - c) . x, at most |w - c| |x|. What kernels compute differs from that:

    sums       products are exact or rounded once with the sum that they enter (bf16 pairs, f32
               multiply-add; whole numbers are exact). A sum of m roundings has an error of m u
               / (1 - m u) times the sum of magnitudes, u = 2^-24, and that is at most |w| |x|.
               Every tier has 8 lanes or more, so that m <= n / 8 + 64: a term goes through the sums
               of one lane, those over lanes, scales, and the bound's own sums.
    16 bits    where activations are whole numbers (formats/whole.py) each is within 0.51 steps of
               its chunk's largest / 32767, so that a chunk of up to 128 columns adds
               2^-16 1.02 sqrt(128) |c| |x| at most: less than 12 2^-16
    tiny       operands and sums below 2^-126 may count as 0: together less than n (|w| + |x| + 1)
               2^-126, which 2^-50 added to the norm and to |x| make up for

so |y - y'| <= norm |x| with norm = |w - c| + ((n / 8 + 64) u + 12 2^-16) (|w| + |c|). Both lengths
are made larger by 2^-9 for m u in the denominator and for the sums of squares that they come from
(n <= 65536). What is not finite makes a bound NaN or infinite: such rows are computed.
"""

from __future__ import annotations

from collections.abc import Callable

from hmc.codegen.decode.tiles import BYTES, GRAIN, ROWS, Tiles
from hmc.codegen.formats.forms import dot_of
from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.weights import row_bytes, weights_f32
from hmc.codegen.ir import F32, I8, I16, I32, I64, Emitter, Value, const, fconst, vec
from hmc.codegen.kernels.matmul.linear import emit_linear
from hmc.codegen.kernels.routing.route import ordered_key
from hmc.codegen.kernels.routing.threshold import LEAST, threshold
from hmc.codegen.ragged import ceil_div
from hmc.codegen.vector import fmax, for_blocks, fsplat, isplat, load_f32, sqrt

TOP = 16
"""Rows of which only the best lower bound is kept: of the k best rows few share one."""
PADDED = 16
"""What a token has room for in `tops` is a multiple of it: whole vectors on every tier."""
COUNTS = 8
"""Words of each worker in `counts`, a cache line of its own: rows computed, blocks read whole."""
_MANY = 8
"""A block of `ROWS` is read whole where more than one in so many of its rows would be."""
_LARGER, _TINY = 1 + 2.0**-9, 2.0**-50
_ROUND = 1.5 * 2.0**23  # added, it leaves round(x) in the low bits

emit_screen = emit_linear


def slack(k: int) -> float:
    """What |w| + |c| is multiplied by for the roundings of both sums over `k` columns."""
    return (k / 8 + 64) * 2.0**-24 + 12 * 2.0**-16


def emit_screen_copy(e: Emitter) -> None:
    """IR of `screen_copy`; params k, group."""
    b, k, group, lanes = e.b, e.spec["k"], e.spec["group"], e.lanes
    start, stop = e.split(e.arg["rows"])
    with e.for_range(start, stop) as row:
        stored = e.offset(e.arg["w"], b.mul(row, const(row_bytes(e.spec.weight, k))))
        codes = e.offset(e.arg["codes"], b.mul(row, const(k)))
        scales = e.offset(e.arg["scales"], b.mul(row, const(2 * (k // group))))
        rest, whole = (e.local(vec(F32, lanes), e.zeros(F32, lanes)) for _ in range(2))
        with e.for_range(0, k, group) as at:
            values = weights_f32(e, e.spec, Row(stored, ()), at, group)
            scale = _scale(e, values)
            bits = b.trunc(b.lshr(b.bitcast(scale, I32), I32(16)), I16)
            e.store(bits, scales, b.udiv(at, const(group)))
            times = e.splat(scale, lanes)
            inverse = b.fdiv(fsplat(1.0, lanes), times)
            inverse = b.select(b.fcmp_ordered("==", times, e.zeros(F32, lanes)), times, inverse)
            for number, value in enumerate(values):
                code = _code(e, value, inverse)
                e.store(code, codes, b.add(at, const(number * lanes)))
                meant = b.sitofp(code, value.type)
                less = e.fma(b.fneg(meant), times, value)
                b.store(e.fma(less, less, b.load(rest)), rest)
                b.store(e.fma(value, value, b.load(whole)), whole)
        residual, length = (sqrt(e, e.reduce_add(b.load(each))) for each in (rest, whole))
        both = b.fadd(b.fadd(length, length), residual)  # |c| <= |w| + |w - c|
        norm = b.fadd(residual, b.fmul(both, fconst(slack(k))))
        norm = b.fadd(b.fmul(norm, fconst(_LARGER)), fconst(_TINY))
        e.store(norm, e.arg["norms"], row, align=4)


def _scale(e: Emitter, values: list[Value]) -> Value:
    """The largest magnitude / 127 as f32, rounded up to bf16, so that codes are 127 at most."""
    b, lanes = e.b, e.lanes
    largest = e.zeros(F32, lanes)
    for value in values:
        size = b.and_(b.bitcast(value, vec(I32, lanes)), isplat(0x7FFFFFFF, lanes))
        largest = fmax(e, b.bitcast(size, value.type), largest)
    most = e.reduce(largest, lambda left, right: fmax(e, left, right))
    bits = b.add(b.bitcast(b.fdiv(most, fconst(127.0)), I32), I32(0xFFFF))
    return b.bitcast(b.and_(bits, I32(-0x10000)), F32)


def _code(e: Emitter, value: Value, inverse: Value) -> Value:
    """`<lanes x i8>`: value x inverse to the nearest whole number."""
    b, lanes = e.b, e.lanes
    whole = b.bitcast(e.fma(value, inverse, fsplat(_ROUND, lanes)), vec(I32, lanes))
    return b.trunc(whole, vec(I8, lanes))


def _length(e: Emitter, token: Value) -> Value:
    """|x| of a token (f32), or a little more."""
    b, total = e.b, e.local(vec(F32, e.lanes), e.zeros(F32, e.lanes))
    row = b.bitcast(e.row("x", token, element=I16), BYTES)

    def strip(index: Value, count: int) -> None:
        value = load_f32(e, "bf16", row, index, count)
        b.store(e.fma(value, value, b.load(total)), total)

    for_blocks(e, e.spec["k"], e.lanes, strip)
    length = sqrt(e, e.reduce_add(b.load(total)))
    return b.fadd(b.fmul(length, fconst(_LARGER)), fconst(_TINY))


def _bound(e: Emitter, token: Value, row: Value, length: Value, width: int) -> Value:
    """The result of `screen` for `width` rows from `row` on, moved by their norm times `length`."""
    y, norm = (
        e.load_some(base, at, F32, width)
        for base, at in ((_row(e, token), row), (e.arg["norms"], row))
    )
    return e.fma(norm, length if width == 1 else e.splat(length, width), y)


def _row(e: Emitter, token: Value) -> Value:
    return e.b.bitcast(e.row("y", token), BYTES)


def _keys(e: Emitter, value: Value) -> Value:
    """As `ordered_key`, of a vector or a scalar."""
    if value.type != F32:
        return ordered_key(e, value)
    return e.b.extract_element(ordered_key(e, e.splat(value, 4)), I32(0))


def emit_screen_tops(e: Emitter) -> None:
    """IR of `screen_tops`; params k, tokens."""
    b, rows = e.b, e.arg["rows"]
    start, stop = e.split(ceil_div(e, rows, const(TOP)))
    best = [(e.local(vec(I32, e.lanes)), isplat(LEAST, e.lanes)), (e.local(I32), I32(LEAST))]
    with e.for_range(0, e.arg["tokens"]) as token:
        less = b.fneg(_length(e, token))
        with e.for_range(start, stop) as top:
            first = b.mul(top, const(TOP))
            count = b.sub(e.minimum(b.add(first, const(TOP)), rows), first)
            for slot, least in best:
                b.store(least, slot)
            for index, width in e.in_vectors(count, e.lanes):
                key = _keys(e, _bound(e, token, b.add(first, index), less, width))
                slot = best[width == 1][0]
                b.store(_larger(e, key, b.load(slot)), slot)
            many, one = (b.load(slot) for slot, _ in best)
            found = _larger(e, e.reduce(many, lambda x, y: _larger(e, x, y)), one)
            place = b.add(b.mul(token, e.arg["tops_stride"]), top)
            e.store(found, e.arg["tops"], place, align=4)


def _larger(e: Emitter, left: Value, right: Value) -> Value:
    return e.b.select(e.b.icmp_signed(">", left, right), left, right)


def emit_screen_rows(e: Emitter) -> None:
    """IR of `screen_rows`; params k, tokens and those of the weight."""
    b, spec, rows, tokens = e.b, e.spec, e.arg["rows"], e.arg["tokens"]
    tiles = Tiles(e, dot_of(spec, spec["k"]), spec["tokens"])
    xs = tiles.prepared(e.arg["x"], tokens, e.arg["x_stride"], spec["tokens"], e.arg["scale"])
    lengths = e.local(F32, count=spec["tokens"])
    floors = e.local(I32, count=spec["tokens"])
    tops = b.mul(ceil_div(e, ceil_div(e, rows, const(TOP)), const(PADDED)), const(PADDED))
    with e.for_range(0, tokens) as token:
        b.store(_length(e, token), b.gep(lengths, [token]))
        keys = b.mul(b.mul(token, e.arg["tops_stride"]), const(4))
        most = e.load_int(e.arg["best"], token, align=4)
        floor = threshold(e, e.offset(e.arg["tops"], keys), tops, most)
        b.store(b.trunc(floor, I32), b.gep(floors, [token]))
    out = e.local(F32, count=spec["tokens"] * ROWS)
    wanted = e.buffer(I32, ROWS)
    computed, read = e.local(I64, const(0)), e.local(I64, const(0))

    def matvec(first: Value, last: Value) -> None:
        following = e.offset(e.arg["w"], b.mul(first, const(tiles.dot.row_bytes)))
        matrix = (e.arg["w"], e.arg["scale"])
        tiles.matvec(matrix, first, last, xs, tokens, out, const(ROWS), following)

    def put(first: Value, count: Value, line: Callable[[Value, Value, int], Value]) -> None:
        with e.for_range(0, tokens) as token:
            for index, width in e.in_vectors(count, e.lanes):
                e.store(line(token, index, width), _row(e, token), b.add(first, index))

    def result(token: Value, index: Value, width: int) -> Value:
        place = b.add(b.mul(token, const(ROWS)), index)
        return e.load_some(b.bitcast(out, BYTES), place, F32, width)

    def never(token: Value, index: Value, width: int) -> Value:
        return fconst(-float("inf")) if width == 1 else fsplat(-float("inf"), width)

    start, stop = e.split(rows, GRAIN)
    with e.for_range(start, stop, ROWS) as first:
        last = e.minimum(b.add(first, const(ROWS)), stop)
        size = b.sub(last, first)
        count = _mark(e, first, size, lengths, floors, wanted)
        many = b.icmp_signed(">", b.mul(count, const(_MANY)), size)
        with b.if_else(many, likely=False) as (whole, some):
            with whole:
                matvec(first, last)
                put(first, size, result)
                b.store(b.add(b.load(computed), size), computed)
                b.store(b.add(b.load(read), const(1)), read)
            with some:
                put(first, size, never)
                b.store(b.add(b.load(computed), count), computed)
                with (
                    b.if_then(b.icmp_signed(">", count, const(0))),
                    e.for_range(0, size) as index,
                    b.if_then(b.icmp_signed("!=", b.load(b.gep(wanted, [index])), I32(0))),
                ):
                    row = b.add(first, index)
                    matvec(row, b.add(row, const(1)))
                    put(row, const(1), result)
    counts = b.mul(e.worker, const(COUNTS))
    for place, slot in enumerate((computed, read)):
        at = b.add(counts, const(place))
        before = e.load(e.arg["counts"], at, I64, align=8)
        e.store(b.add(before, b.load(slot)), e.arg["counts"], at, align=8)


def _mark(
    e: Emitter, first: Value, size: Value, lengths: Value, floors: Value, wanted: Value
) -> Value:
    """Make `wanted` (i32*) other than 0 where a row of the `size` from `first` on may be among the
    best of a token; how many are (i64).
    """
    b, total = e.b, e.local(I64)
    b.store(const(0), total)
    flags = b.bitcast(wanted, BYTES)
    for index, width in e.in_vectors(size, e.lanes):
        kind = I32 if width == 1 else vec(I32, width)
        zero = I32(0) if width == 1 else isplat(0, width)
        found = e.local(kind)
        b.store(zero, found)
        with e.for_range(0, e.arg["tokens"]) as token:
            length, floor = (b.load(b.gep(base, [token])) for base in (lengths, floors))
            upper = _bound(e, token, b.add(first, index), length, width)
            floor = floor if width == 1 else e.splat(floor, width)
            reaches = b.icmp_signed(">=", _keys(e, upper), floor)
            reaches = b.or_(reaches, b.fcmp_unordered("uno", upper, upper))
            b.store(b.or_(b.load(found), b.zext(reaches, kind)), found)
        flagged = b.load(found)
        e.store(flagged, flags, index)
        if width > 1:
            flagged = e.call(f"llvm.vector.reduce.add.v{width}i32", I32, flagged)
        b.store(b.add(b.load(total), b.zext(flagged, I64)), total)
    return b.load(total)
