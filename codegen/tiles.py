"""Rows of a weight matrix times 1 to 16 token rows: the loop nest of every decode matmul; hides blocking and prefetch.

`Tiles` emits one private subroutine per small token count (rows x tokens accumulators stay in registers) and one,
`matvec`, that covers any token count with them. Whatever the blocking, a token's sum over k is always made in the same
order, so its result depends neither on the other tokens nor on who computes the row.

Tile choices: `rows` in flight, `prefetch` bytes ahead in each row (0: none). Near the end of a row the prefetch moves on
to the same place of the next rows, and after the last to `following`, where the caller goes on reading.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.dot import Dot
from hmc.codegen.ir import F32, I8, I32, I64, Emitter, Value, const, vec

BYTES = I8.as_pointer()
FLOATS = F32.as_pointer()
ROWS = 128
"""Rows whose results callers keep on the stack between `matvec` and their epilogue."""

_TOKEN_TILES = (8, 6, 4, 3, 2, 1)
_REREAD_BYTES = 128 << 10
"""Weights that several token tiles read in turn: they stay in the second-level cache."""


class Tiles:
    """The subroutines of one kernel; `dot` says how rows are stored, `tokens` how many tokens there can be."""

    def __init__(self, e: Emitter, dot: Dot, tokens: int) -> None:
        self.dot = dot
        self.tokens = tokens
        self.rows = e.spec.tiled("rows", 4)
        self.prefetch = e.spec.tiled("prefetch", 1024)
        self._sizes = [size for size in _TOKEN_TILES if size <= tokens]
        for size in self._sizes:
            self._emit_tile(e, size)
        self._emit_matvec(e)

    # -- for callers -------------------------------------------------------------------------------

    def prepare(self, e: Emitter, row_of: Value, count: Value, stride: Value, most: int) -> Value:
        """Bring `count` <= `most` bf16 rows (from i8* `row_of`, `stride` elements apart) into the form's order.

        Returns the i8* of the prepared rows, `dot.prepared_bytes` apart.
        """
        prepared = e.local(vec(I64, 8), count=most * self.dot.prepared_bytes // 64)
        prepared.align = 64
        base = e.b.bitcast(prepared, BYTES)
        with e.for_range(0, count) as row:
            source = e.offset(row_of, e.b.mul(row, e.b.shl(stride, const(1))))
            target = e.offset(base, e.b.mul(row, const(self.dot.prepared_bytes)))
            self.dot.prepare(e, source, target)
        return base

    def matvec(
        self,
        e: Emitter,
        w: Value,
        scale: Value,
        start: Value,
        stop: Value,
        xs: Value,
        tokens: Value,
        out: Value,
        out_stride: Value,
        following: Value,
    ) -> None:
        """out[t * out_stride + row - start] = x[t] . w[row] in f32, for rows [start, stop) and t < `tokens`.

        `xs` points to the addresses of the prepared rows (i8**), `out` is f32*; `start` is a multiple of `rows`.
        """
        e.b.call(
            e.module.globals["matvec"],
            [w, scale, start, stop, xs, tokens, out, out_stride, following],
        )

    # -- subroutines -------------------------------------------------------------------------------

    def _emit_matvec(self, e: Emitter) -> None:
        kinds = (BYTES, BYTES, I64, I64, BYTES.as_pointer(), I64, FLOATS, I64, BYTES)
        sub = max(self.rows, _REREAD_BYTES // max(1, self.dot.row_bytes) // self.rows * self.rows)
        with e.subroutine("matvec", *kinds) as arguments:
            w, scale, start, stop, xs, tokens, out, out_stride, following = arguments
            b = e.b
            # One tile does all: let it run through. Several: in blocks of rows that stay in cache.
            single = b.icmp_signed("<=", tokens, const(self._sizes[0]))
            step = b.select(single, b.sub(stop, start), const(sub))
            step = b.select(b.icmp_signed("<", step, const(1)), const(1), step)
            with e.for_range(start, stop, step) as first:
                last = e.minimum(b.add(first, step), stop)
                end = e.offset(w, b.mul(last, const(self.dot.row_bytes)))
                after = b.select(b.icmp_signed("<", last, stop), end, following)
                done = e.local(I64)
                b.store(const(0), done)
                for size in self._sizes:
                    self._while_left(
                        e,
                        size,
                        tokens,
                        done,
                        (w, scale, first, last, xs, out, out_stride, after, start),
                    )

    def _while_left(
        self, e: Emitter, size: int, tokens: Value, done: Value, where: tuple[Value, ...]
    ) -> None:
        """Call the tile of `size` tokens as often as it fits into what is left of `tokens`."""
        w, scale, first, last, xs, out, out_stride, after, start = where
        b = e.b
        fits = b.sub(tokens, const(size - 1))
        with e.for_range(b.load(done), fits, size) as token:
            target = b.gep(out, [b.add(b.mul(token, out_stride), b.sub(first, start))])
            b.call(
                e.module.globals[f"tile{size}"],
                [w, scale, first, last, b.gep(xs, [token]), target, out_stride, after],
            )
            b.store(b.add(token, const(size)), done)

    def _emit_tile(self, e: Emitter, tokens: int) -> None:
        kinds = (BYTES, BYTES, I64, I64, BYTES.as_pointer(), FLOATS, I64, BYTES)
        rows = max(1, min(self.rows, 8 // tokens))
        streams = e.spec.tiled("streams", 1)
        with e.subroutine(f"tile{tokens}", *kinds) as arguments:
            w, scale, start, stop, xs, out, out_stride, following = arguments
            b = e.b
            x = [b.load(b.gep(xs, [const(token)])) for token in range(tokens)]
            span = b.mul(b.sdiv(b.sub(stop, start), const(rows * streams)), const(rows))
            whole = b.add(start, b.mul(span, const(streams)))
            places = (w, scale, start, out, out_stride, stop, following)
            with e.for_range(start, b.add(start, span), rows) as row:
                self._row_block(e, x, rows, [b.add(row, b.mul(span, const(s))) for s in range(streams)], places)
            if rows * streams > 1:
                with e.for_range(whole, stop) as row:
                    self._row_block(e, x, 1, [row], places)

    def _row_block(
        self, e: Emitter, x: list[Value], count: int, rows: list[Value], places: tuple[Value, ...]
    ) -> None:
        w, scale, start, out, out_stride, stop, following = places
        b, dot = e.b, self.dot
        zero = e.zeros(F32, dot.lanes)
        totals = [[[e.local(zero.type) for _ in x] for _ in range(count)] for _ in rows]
        unroll = e.spec.tiled("unroll", 1)
        for r in range(count):
            streams = [e.offset(w, b.mul(b.add(row, const(r)), const(dot.row_bytes))) for row in rows]
            scales = [dot.scale_row(e, scale, b.add(row, const(r))) for row in rows] if dot.scaled else []
            line = [t[r] for t in totals]
            for part in line:
                for slot in part:
                    b.store(zero, slot)
            step = dot.chunk * unroll
            whole = dot.k // step * step
            with e.for_range(0, whole, step) as k:
                for u in range(unroll):
                    kk = b.add(k, const(u * dot.chunk))
                    self._prefetch(e, streams, kk)
                    self._chunk(e, streams, scales, x, line, kk, dot.chunk)
            for kk in range(whole, dot.k, dot.chunk):
                self._chunk(e, streams, scales, x, line, const(kk), min(dot.chunk, dot.k - kk))
        for s, row in enumerate(rows):
            for token in range(len(x)):
                sums = reduce_rows(e, [b.load(line[token]) for line in totals[s]])
                target = b.add(b.mul(const(token), out_stride), b.sub(row, start))
                pointer = b.bitcast(b.gep(out, [target]), sums.type.as_pointer())
                b.store(sums, pointer, align=4)

    def _prefetch(self, e: Emitter, streams: list[Value], k: Value) -> None:
        if self.prefetch == 0:
            return
        b, dot = e.b, self.dot
        at = b.udiv(b.mul(k, const(dot.chunk_bytes)), const(dot.chunk))
        place = b.add(at, const(self.prefetch))
        for stream in streams:
            for line in range(0, dot.chunk_bytes, 64):
                e.prefetch(e.offset(stream, b.add(place, const(line))), self.dot.spec.tiled("locality", 3))

    def _chunk(
        self,
        e: Emitter,
        streams: list[Value],
        scales: list[Value],
        x: list[Value],
        totals: list[list[Value]],
        k: Value,
        valid: int,
    ) -> None:
        b, dot = e.b, self.dot
        sums = [
            [e.zeros(F32, dot.lanes) if dot.scaled else b.load(slot) for slot in line] for line in totals
        ]
        for start in range(0, valid, dot.unit):
            at = b.add(k, const(start))
            rows = [dot.weights(e, stream, at, valid - start) for stream in streams]
            for token, prepared in enumerate(x):
                for step in range(len(rows[0])):
                    activations = dot.activations(e, prepared, at, step)
                    for line, weights in zip(sums, rows, strict=True):
                        line[token] = dot.multiply(e, line[token], weights[step], activations)
        for r, line in enumerate(sums):
            if dot.scaled:
                factor = dot.scale(e, scales[r], k, valid)
                line = [
                    e.fma(value, factor, b.load(slot)) for value, slot in zip(line, totals[r], strict=True)
                ]
            for value, slot in zip(line, totals[r], strict=True):
                b.store(value, slot)


def reduce_rows(e: Emitter, vectors: list[Value]) -> Value:
    """Sum of the lanes of each of `vectors` (1, 2, 4 or 8 of equal width), as one vector of as many sums.

    Lanes are added by halving, in the order of `Emitter.reduce_add`, but for all vectors at once.
    """
    b = e.b
    width = vectors[0].type.count
    count = len(vectors)
    # Before a round every vector holds `held` partial results of `width` lanes each, one after the other.
    held = 1
    lanes = width
    while lanes > 1:
        half = lanes // 2
        low = [i for part in range(held) for i in range(part * lanes, part * lanes + half)]
        high = [i + half for i in low]
        if len(vectors) > 1:
            size = held * lanes
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
            vectors = [
                b.fadd(
                    b.shuffle_vector(left, right, _mask(low + [i + size for i in low])),
                    b.shuffle_vector(left, right, _mask(high + [i + size for i in high])),
                )
                for left, right in pairs
            ]
            held *= 2
        else:
            undef = ir.Constant(vectors[0].type, ir.Undefined)
            vectors = [
                b.fadd(*(b.shuffle_vector(vectors[0], undef, _mask(part)) for part in (low, high)))
            ]
        lanes = half
    assert held == count, (held, count)
    return vectors[0]


def _mask(lanes: list[int]) -> ir.Constant:
    return ir.Constant(vec(I32, len(lanes)), [ir.Constant(I32, lane) for lane in lanes])
