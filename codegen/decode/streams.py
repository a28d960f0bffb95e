"""A tile whose rows memory feeds: runs side by side, each read front to back, with prefetch.

One row of each run is in flight. (Neighbouring rows side by side were tried first and reached half
of the bandwidth: their streams end every few KiB.) Every `batch` rows of a run are summed up
together.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from hmc.codegen.decode.rows import Rows
from hmc.codegen.formats.dot import Dot
from hmc.codegen.ir import F32, I64, Emitter, Value, const
from hmc.codegen.vector import lanes_mask

_L2 = 2
"""Prefetch locality: second-level cache, since the first holds the activations."""


@dataclass(frozen=True)
class Tile:
    """Rows [start, stop) of the matrix at `w` (i8*), scales at `scale`, times the prepared tokens
    `x`.

    Results go to `out` (f32*), `out_stride` between tokens, from row `start` on; the caller reads
    `following` (i8*) next.
    """

    e: Emitter
    dot: Dot
    x: list[Value]
    w: Value
    scale: Value
    start: Value
    stop: Value
    out: Value
    out_stride: Value
    following: Value

    def rows(self, numbers: list[Value]) -> Rows:
        """Sums, still zero, of the rows `numbers`."""
        e, dot = self.e, self.dot
        bases = [e.offset(self.w, e.b.mul(row, const(dot.row_bytes))) for row in numbers]
        scales = [dot.scale_row(e, self.scale, row) for row in numbers] if dot.scaled else []
        zero = e.zeros(F32, dot.lanes)
        totals = [[e.local(zero.type, zero) for _ in self.x] for _ in numbers]
        return Rows(e, dot, bases, scales, self.x, totals)

    def finish(self, row: Value, lanes: list[list[Value]]) -> None:
        """Store the results of rows `row`, `row` + 1, ... from the lanes of their sums,
        [token][row].
        """
        b = self.e.b
        for token, vectors in enumerate(lanes):
            sums = reduce_rows(self.e, vectors)
            place = b.add(b.mul(const(token), self.out_stride), b.sub(row, self.start))
            pointer = b.bitcast(b.gep(self.out, [place]), sums.type.as_pointer())
            b.store(sums, pointer, align=4)


def emit_streams(tile: Tile, batch: int, streams: int, prefetch: int) -> None:
    """The tile's rows in `streams` runs, `batch` rows of each summed up together; then, one by one,
    what is left over. `prefetch`: bytes ahead over all runs together, 0 for none; past the end of
    the runs it goes on at `tile.following`.
    """
    e, b = tile.e, tile.e.b
    at = e.local(I64, tile.start)
    for size, count in dict.fromkeys([(batch, streams), (1, 1)]):
        first = b.load(at)
        run = b.mul(b.sdiv(b.sub(tile.stop, first), const(size * count)), const(size))
        end = b.add(first, run)
        row_bytes = const(tile.dot.row_bytes)
        beyond = b.sub(
            b.ptrtoint(tile.following, I64),
            b.ptrtoint(e.offset(tile.w, b.mul(end, row_bytes)), I64),
        )
        ahead = _Ahead(tile, end, beyond, prefetch // count)
        with e.for_range(first, end, size) as row:
            numbers = [b.add(row, b.mul(run, const(stream))) for stream in range(count)]
            _batch(tile, numbers, size, ahead)
        b.store(b.add(first, b.mul(run, const(count))), at)


@dataclass(frozen=True)
class _Ahead:
    """Asks for what the runs read `bytes` later; the first run ends at row `end`, and `beyond`
    bytes lie between its end and where reading goes on.
    """

    tile: Tile
    end: Value
    beyond: Value
    bytes: int

    def fetch(self, rows: Rows, row: Value, k: Value) -> None:
        """Before the chunk at element `k` of `rows`, the first of which is number `row`."""
        if self.bytes == 0:
            return
        e, b, dot = self.tile.e, self.tile.e.b, self.tile.dot
        left = b.mul(b.sub(self.end, row), const(dot.row_bytes))
        at = b.udiv(b.mul(k, const(dot.chunk_bytes)), const(dot.chunk))
        at = b.add(at, const(self.bytes))
        inside = b.icmp_signed("<", at, left)
        at = b.add(at, b.select(inside, const(0), self.beyond))
        for base in rows.bases:
            prefetch_lines(e, e.offset(base, at), dot.chunk_bytes)


def prefetch_lines(e: Emitter, base: Value, count: int) -> None:
    """Ask for `count` bytes from `base` on."""
    for line in range(0, count, 64):
        e.prefetch(e.offset(base, const(line)), _L2)


def _batch(tile: Tile, firsts: list[Value], batch: int, ahead: _Ahead) -> None:
    """`batch` rows of each run, from the rows `firsts` on: a loop at run time, since each of its
    rounds is hundreds of instructions that have to be compiled.
    """
    e, b, dot = tile.e, tile.e.b, tile.dot
    zero = e.zeros(F32, dot.lanes)
    held = [[e.local(zero.type, count=batch) for _ in tile.x] for _ in firsts]
    with e.for_range(0, batch) as r:
        numbers = [b.add(first, r) for first in firsts]
        rows = tile.rows(numbers)
        rows.add(partial(ahead.fetch, rows, numbers[0]))
        for line, sums in zip(held, rows.sums(), strict=True):
            for slot, value in zip(line, sums, strict=True):
                b.store(value, b.gep(slot, [r]))
    for first, line in zip(firsts, held, strict=True):
        lanes = [[b.load(b.gep(slot, [const(r)])) for r in range(batch)] for slot in line]
        tile.finish(first, lanes)


def reduce_rows(e: Emitter, vectors: list[Value]) -> Value:
    """Sum of the lanes of each of `vectors` (1, 2, 4 or 8 of equal width), as one vector of as many
    sums.

    Lanes are added by halving, in the order of `Emitter.reduce_add`, but for all vectors at once.
    """
    b = e.b
    width = vectors[0].type.count
    count = len(vectors)
    # Before a round every vector holds `held` partial results of `width` lanes each, one after the
    # other.
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
                    b.shuffle_vector(left, right, lanes_mask(low + [i + size for i in low])),
                    b.shuffle_vector(left, right, lanes_mask(high + [i + size for i in high])),
                )
                for left, right in pairs
            ]
            held *= 2
        else:
            undef = ir.Constant(vectors[0].type, ir.Undefined)
            vectors = [
                b.fadd(
                    *(b.shuffle_vector(vectors[0], undef, lanes_mask(part)) for part in (low, high))
                )
            ]
        lanes = half
    assert held == count, (held, count)
    return vectors[0]
