"""Rows of a weight matrix times 1 to 16 token rows: the loop nest of every decode matmul; hides
blocking and prefetch.

`Tiles` emits one private subroutine per small token count and one, `matvec`, that covers any token
count with them. Whatever the blocking, a token's sum over k is always made in the same order, so
its result depends neither on the other tokens nor on who computes the row.

Rows are read as memory likes it (streams.py); every `rows` rows of a run are summed up together.

Tile choices: `streams`, `rows`, and `prefetch`, bytes ahead over all runs together (0: none), into
the second-level cache, since the first holds the activations. Past the end of the runs the prefetch
goes on at `following`, where the caller does.
"""

from __future__ import annotations

from hmc.codegen.decode.grain import GRAIN as GRAIN
from hmc.codegen.decode.streams import Tile, emit_streams
from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.order import gather, has_order, order_of, room
from hmc.codegen.ir import F32, I8, I64, Emitter, Value, const, vec

BYTES = I8.as_pointer()
FLOATS = F32.as_pointer()
ROWS = 512
"""Rows whose results callers keep on the stack between `matvec` and their epilogue: runs stay long.
"""
_TOKEN_TILES = {32: (8, 6, 4, 3, 2, 1), 16: (4, 3, 2, 1)}
"""Tokens of a tile, by registers. With 16 registers of 8 lanes two tiles of 4 take 27 cycles for 32
FP8 weights where one of 8 takes 40: what it saves in decoding it loses in sums that do not fit."""

_AHEAD = {32: 8192, 16: 2048}
"""Bytes to prefetch ahead, by registers: measured on Zen 4 and Zen 3, where 8 KiB cost BF16 a tenth
and more."""

_SUMS = 8
"""Sums under way that hide the latency of a multiply-add and have registers."""
_REREAD_BYTES = 128 << 10
"""Weights that several token tiles read in turn: they stay in the second-level cache."""


def pointers(e: Emitter, count: int) -> Value:
    """A stack array (i8**) of `count` addresses."""
    return e.b.bitcast(e.local(BYTES, count=count), BYTES.as_pointer())


class Tiles:
    """The subroutines of one kernel; `dot` says how rows are stored, `tokens` how many tokens there
    can be.
    """

    def __init__(self, e: Emitter, dot: Dot, tokens: int) -> None:
        self.e, self.dot = e, dot
        self.ordered = has_order(dot.planes)
        """Whether rows are prepared for one matrix alone, whose columns lie in an order."""
        self._gathered = room(e, dot.k) if self.ordered else None
        self.rows = e.spec.tiled("rows", 4)
        self._streams = e.spec.tiled("streams", 4)
        self._prefetch_bytes = e.spec.tiled("prefetch", _AHEAD[dot.registers])
        self._sizes = [size for size in _TOKEN_TILES[dot.registers] if size <= tokens]
        for size in self._sizes:
            self._emit_tile(size)
        self._emit_matvec()

    # -- for callers -------------------------------------------------------------------------------

    def room(self, count: int) -> Value:
        """Stack room (i8*) for `count` prepared rows."""
        e = self.e
        prepared = e.local(vec(I64, 8), count=count * self.dot.prepared_bytes // 64)
        prepared.align = 64
        return e.b.bitcast(prepared, BYTES)

    def place(self, base: Value, row: Value) -> Value:
        """Address of prepared row number `row` of those at `base`."""
        return self.e.offset(base, self.e.b.mul(row, const(self.dot.prepared_bytes)))

    def prepare_row(self, x: Value, target: Value, beside: Value | None) -> None:
        """Bring the bf16 row at `x` into the form's order; `beside` is what lies beside the codes
        of the matrix, if tiles are `ordered`.
        """
        if self.ordered:
            order = order_of(self.e, self.dot.planes, beside)
            gather(self.e, x, order, const(0), self.dot.k, self._gathered)
            x = self._gathered
        self.dot.prepare(self.e, x, target)

    def prepare(
        self, x: Value, count: Value, stride: Value, most: int, beside: Value | None = None
    ) -> Value:
        """The same for `count` <= `most` rows (from i8* `x`, `stride` elements apart).

        Returns the i8* of the prepared rows, `dot.prepared_bytes` apart.
        """
        e, base = self.e, self.room(most)
        with e.for_range(0, count) as row:
            source = e.offset(x, e.b.mul(row, e.b.shl(stride, const(1))))
            self.prepare_row(source, self.place(base, row), beside)
        return base

    def prepared(
        self, x: Value, count: Value, stride: Value, most: int, beside: Value | None = None
    ) -> Value:
        """The same, and the addresses of the prepared rows (i8**)."""
        base, table = self.prepare(x, count, stride, most, beside), pointers(self.e, most)
        with self.e.for_range(0, count) as index:
            self.e.b.store(self.place(base, index), self.e.b.gep(table, [index]))
        return table

    def matvec(
        self,
        matrix: tuple[Value, Value],
        start: Value,
        stop: Value,
        xs: Value,
        tokens: Value,
        out: Value,
        out_stride: Value,
        following: Value,
    ) -> None:
        """out[t * out_stride + row - start] = x[t] . w[row] in f32, for rows [start, stop) and t <
        `tokens`.

        `matrix` is (weights, scales); `xs` points to the addresses of the prepared rows (i8**),
        `out` is f32*; the caller reads `following` (i8*) next.
        """
        self.e.run("matvec", *matrix, start, stop, xs, tokens, out, out_stride, following)

    # -- subroutines -------------------------------------------------------------------------------

    def _emit_matvec(self) -> None:
        e = self.e
        kinds = (BYTES, BYTES, I64, I64, BYTES.as_pointer(), I64, FLOATS, I64, BYTES)
        with e.subroutine("matvec", *kinds) as (
            w, scale, start, stop, xs, tokens, out, out_stride, following,
        ):  # fmt: skip
            b = e.b
            # One tile does all: let it run through. Several: in blocks of rows that stay in cache.
            sub = max(GRAIN, _REREAD_BYTES // self.dot.row_bytes // GRAIN * GRAIN)
            single = b.icmp_signed("<=", tokens, const(self._sizes[0]))
            step = b.select(single, b.add(b.sub(stop, start), const(1)), const(sub))
            with e.for_range(start, stop, step) as first:
                last = e.minimum(b.add(first, step), stop)
                end = e.offset(w, b.mul(last, const(self.dot.row_bytes)))
                after = b.select(b.icmp_signed("<", last, stop), end, following)
                place = b.gep(out, [b.sub(first, start)])
                done = e.local(I64)
                b.store(const(0), done)
                for size in self._sizes:
                    with e.for_range(b.load(done), b.sub(tokens, const(size - 1)), size) as token:
                        target = b.gep(place, [b.mul(token, out_stride)])
                        x = b.gep(xs, [token])
                        e.run(f"tile{size}", w, scale, first, last, x, target, out_stride, after)
                        b.store(b.add(token, const(size)), done)

    def _emit_tile(self, tokens: int) -> None:
        e = self.e
        kinds = (BYTES, BYTES, I64, I64, BYTES.as_pointer(), FLOATS, I64, BYTES)
        with e.subroutine(f"tile{tokens}", *kinds) as (
            w, scale, start, stop, xs, out, out_stride, following,
        ):  # fmt: skip
            x = [e.b.load(e.b.gep(xs, [const(token)])) for token in range(tokens)]
            tile = Tile(e, self.dot, x, w, scale, start, stop, out, out_stride, following)
            emit_streams(tile, *self._shape(tokens), self._prefetch_bytes)

    def _shape(self, tokens: int) -> tuple[int, int]:
        """Rows of a run whose lanes are summed up together; runs."""
        streams = min(self._streams, max(2, _SUMS // tokens))
        return max(1, min(self.rows, 8 // tokens)), streams
