"""A tile whose rows memory feeds: runs side by side, each read front to back, with prefetch.

One row of each run is in flight. (Neighbouring rows side by side were tried first and reached half
of the bandwidth: their streams end every few KiB.) Every `batch` rows of a run are summed up
together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from llvmlite import ir

from hmc.codegen.decode.rows import Rows
from hmc.codegen.formats.dot import Dot
from hmc.codegen.ir import F32, I64, Emitter, Value, const, lanes_mask

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
        rows = [dot.row(e, (self.w, self.scale), number) for number in numbers]
        zero = e.zeros(F32, dot.lanes)
        totals = [[e.local(zero.type, zero) for _ in self.x] for _ in numbers]
        return Rows(e, dot, rows, self.x, totals)

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
    at = tile.e.local(I64, tile.start)
    for size, count in dict.fromkeys([(batch, streams), (1, 1)]):
        _runs(tile, at, size, count, prefetch // count)


def _runs(tile: Tile, at: Value, size: int, count: int, prefetch: int) -> None:
    """`count` runs from row `at` (i64*) on, `size` rows of each at once; `at` moves past them."""
    e, b, dot = tile.e, tile.e.b, tile.dot
    first = b.load(at)
    run = b.mul(b.sdiv(b.sub(tile.stop, first), const(size * count)), const(size))
    end = b.add(first, run)
    row_bytes = const(dot.row_bytes)
    # Bytes between the end of the first run and where reading goes on.
    beyond = b.sub(
        b.ptrtoint(tile.following, I64),
        b.ptrtoint(e.offset(tile.w, b.mul(end, row_bytes)), I64),
    )

    def fetch(bases: list[Value], row: Value, k: Value) -> None:
        """Ask for what is read `prefetch` bytes after the chunk at element `k` of the rows at
        `bases`, the first of which is number `row`.
        """
        if prefetch == 0:
            return
        left = b.mul(b.sub(end, row), row_bytes)
        ahead = b.udiv(b.mul(k, const(dot.chunk_bytes)), const(dot.chunk))
        ahead = b.add(ahead, const(prefetch))
        inside = b.icmp_signed("<", ahead, left)
        ahead = b.add(ahead, b.select(inside, const(0), beyond))
        for base in bases:
            start = e.offset(base, ahead)
            for line in range(0, dot.chunk_bytes, 64):
                e.prefetch(e.offset(start, const(line)), _L2)

    with e.for_range(first, end, size) as row:
        numbers = [b.add(row, b.mul(run, const(stream))) for stream in range(count)]
        _batch(tile, numbers, size, fetch)
    b.store(b.add(first, b.mul(run, const(count))), at)


def _batch(
    tile: Tile, firsts: list[Value], batch: int, fetch: Callable[[list[Value], Value, Value], None]
) -> None:
    """`batch` rows of each run, from the rows `firsts` on: a loop at run time, since each of its
    rounds is hundreds of instructions that have to be compiled.
    """
    e, b, dot = tile.e, tile.e.b, tile.dot
    zero = e.zeros(F32, dot.lanes)
    held = [[e.local(zero.type, count=batch) for _ in tile.x] for _ in firsts]
    with e.for_range(0, batch) as r:
        numbers = [b.add(first, r) for first in firsts]
        rows = tile.rows(numbers)
        rows.add(partial(fetch, [row.codes for row in rows.rows], numbers[0]))
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
    b, count, lanes = e.b, len(vectors), vectors[0].type.count
    # Before a round every vector holds `held` partial results of `lanes` lanes each, one after the
    # other.
    held = 1
    while lanes > 1:
        half = lanes // 2
        low = [i for part in range(held) for i in range(part * lanes, part * lanes + half)]
        pairs = [(vectors[0], ir.Constant(vectors[0].type, ir.Undefined))]
        if len(vectors) > 1:
            low += [i + held * lanes for i in low]
            held *= 2
            pairs = list(zip(vectors[::2], vectors[1::2], strict=True))
        masks = lanes_mask(low), lanes_mask([i + half for i in low])
        vectors = [
            b.fadd(*(b.shuffle_vector(left, right, mask) for mask in masks))
            for left, right in pairs
        ]
        lanes = half
    assert held == count, (held, count)
    return vectors[0]
