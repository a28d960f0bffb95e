"""Rows of a weight matrix times 1 to 16 token rows: the loop nest of every decode matmul; hides
blocking and prefetch.

`Tiles` emits one private subroutine per small token count and one, `matvec`, that covers any token
count with them. Whatever the blocking, a token's sum over k is always made in the same order, so
its result depends neither on the other tokens nor on who computes the row.

Rows are read as memory likes it: a block of rows is cut into `streams` runs, each read front to
back; one row of each run is in flight, and they share the loads of the activations. (Neighbouring
rows side by side were tried first and reached half of that: their streams end every few KiB.) Every
`rows` rows of a run are summed up together.

Tile choices: `streams`, `rows`, and `prefetch`, bytes ahead over all runs together (0: none), into
the second-level cache, since the first holds the activations. Past the end of the runs the prefetch
goes on at `following`, where the caller does.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.dot import Dot
from hmc.codegen.ir import F32, I8, I64, Emitter, Value, const, vec
from hmc.codegen.vector import lanes_mask

BYTES = I8.as_pointer()
FLOATS = F32.as_pointer()
ROWS = 512
"""Rows whose results callers keep on the stack between `matvec` and their epilogue: runs stay long.
"""
GRAIN = 16
"""Rows that work is split by: whole batches of whole streams."""

_TOKEN_TILES = (8, 6, 4, 3, 2, 1)
_REREAD_BYTES = 128 << 10
"""Weights that several token tiles read in turn: they stay in the second-level cache."""
_L2 = 2
"""Prefetch locality: second-level cache."""


class Tiles:
    """The subroutines of one kernel; `dot` says how rows are stored, `tokens` how many tokens there
    can be.
    """

    def __init__(self, e: Emitter, dot: Dot, tokens: int) -> None:
        self.dot = dot
        self.rows = e.spec.tiled("rows", 4)
        self._streams = e.spec.tiled("streams", 4)
        self._prefetch_bytes = e.spec.tiled("prefetch", 8192)
        self._sizes = [size for size in _TOKEN_TILES if size <= tokens]
        for size in self._sizes:
            self._emit_tile(e, size)
        self._emit_matvec(e)

    # -- for callers -------------------------------------------------------------------------------

    def prepare(self, e: Emitter, row_of: Value, count: Value, stride: Value, most: int) -> Value:
        """Bring `count` <= `most` bf16 rows (from i8* `row_of`, `stride` elements apart) into the
        form's order.

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
        """out[t * out_stride + row - start] = x[t] . w[row] in f32, for rows [start, stop) and t <
        `tokens`.

        `xs` points to the addresses of the prepared rows (i8**), `out` is f32*; the caller reads
        `following` (i8*) next.
        """
        e.b.call(
            e.module.globals["matvec"],
            [w, scale, start, stop, xs, tokens, out, out_stride, following],
        )

    # -- subroutines -------------------------------------------------------------------------------

    def _emit_matvec(self, e: Emitter) -> None:
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
                done = e.local(I64, const(0))
                for size in self._sizes:
                    with e.for_range(b.load(done), b.sub(tokens, const(size - 1)), size) as token:
                        target = b.gep(place, [b.mul(token, out_stride)])
                        x = b.gep(xs, [token])
                        b.call(
                            e.module.globals[f"tile{size}"],
                            [w, scale, first, last, x, target, out_stride, after],
                        )
                        b.store(b.add(token, const(size)), done)

    def _emit_tile(self, e: Emitter, tokens: int) -> None:
        kinds = (BYTES, BYTES, I64, I64, BYTES.as_pointer(), FLOATS, I64, BYTES)
        with e.subroutine(f"tile{tokens}", *kinds) as (
            w, scale, start, stop, xs, out, out_stride, following,
        ):  # fmt: skip
            b = e.b
            x = [b.load(b.gep(xs, [const(token)])) for token in range(tokens)]
            at = e.local(I64, start)
            for batch, streams in self._shapes(tokens):
                first = b.load(at)
                run = b.sdiv(b.sub(stop, first), const(batch * streams))
                run = b.mul(run, const(batch))
                end = b.add(first, run)
                beyond = b.sub(
                    b.ptrtoint(following, I64),
                    b.ptrtoint(e.offset(w, b.mul(end, const(self.dot.row_bytes))), I64),
                )
                places = _Run(w, scale, start, end, run, beyond, out, out_stride)
                with e.for_range(first, end, batch) as row:
                    self._rows(e, x, batch, streams, row, places)
                b.store(b.add(first, b.mul(run, const(streams))), at)

    def _shapes(self, tokens: int) -> list[tuple[int, int]]:
        """(rows of a run whose lanes are summed up together, runs) for a tile, then for the rows
        that are left over at a ragged end.
        """
        if self.dot.lanes == 16:
            streams = min(self._streams, max(2, 8 // tokens))
        elif self.dot.scaled:  # 16 registers: decoded weights need half of them
            streams = min(self._streams, 2 if tokens <= 2 else 1)
        else:
            streams = min(self._streams, max(2, 4 // tokens))
        batch = max(1, min(self.rows, 8 // tokens))
        return list(dict.fromkeys([(batch, streams), (1, 1)]))

    def _ways(self, tokens: int) -> int:
        """Chunks of a row summed up at once: one, or two where there are too few sums under way to
        hide the latency of a multiply-add. Every chunk has a sum of its own, so results are the
        same.
        """
        return 2 if self.dot.scaled and self.dot.lanes == 8 and tokens == 1 else 1

    def _rows(
        self, e: Emitter, x: list[Value], batch: int, streams: int, row: Value, places: _Run
    ) -> None:
        """`batch` rows from `row` on of each of `streams` runs, times the tokens `x`: a loop at run
        time, since each of its rounds is hundreds of instructions that have to be compiled.
        """
        b, dot, tokens = e.b, self.dot, len(x)
        zero = e.zeros(F32, dot.lanes)
        rows = [b.add(row, b.mul(places.rows, const(stream))) for stream in range(streams)]
        held = [[e.local(zero.type, count=batch) for _ in x] for _ in rows]
        with e.for_range(0, batch) as r:
            current = [b.add(first, r) for first in rows]
            for line, sums in zip(held, self._row_of_each(e, x, current, places), strict=True):
                for slot, value in zip(line, sums, strict=True):
                    b.store(value, b.gep(slot, [r]))
        for first, line in zip(rows, held, strict=True):
            for token in range(tokens):
                slots = [b.gep(line[token], [const(r)]) for r in range(batch)]
                sums = reduce_rows(e, [b.load(slot) for slot in slots])
                target = b.add(b.mul(const(token), places.out_stride), b.sub(first, places.start))
                pointer = b.bitcast(b.gep(places.out, [target]), sums.type.as_pointer())
                b.store(sums, pointer, align=4)

    def _row_of_each(
        self, e: Emitter, x: list[Value], rows: list[Value], places: _Run
    ) -> list[list[Value]]:
        """Lanes of the sums [row][token] of one row of each run times the tokens `x`."""
        b, dot = e.b, self.dot
        zero = e.zeros(F32, dot.lanes)
        totals = [[e.local(zero.type, zero) for _ in x] for _ in rows]
        seen = [e.local(dot.unseen(e).type, dot.unseen(e)) for _ in rows] if dot.checked else []
        whole = dot.k // dot.chunk * dot.chunk
        step = dot.chunk * self._ways(len(x))
        bases = [e.offset(places.w, b.mul(row, const(dot.row_bytes))) for row in rows]
        scales = [dot.scale_row(e, places.scale, row) for row in rows] if dot.scaled else []
        left = b.mul(b.sub(places.end, rows[0]), const(dot.row_bytes))
        block = _Block(bases, scales, x, totals, seen)
        with e.for_range(0, whole // step * step, step) as k:
            chunks = [b.add(k, const(start)) for start in range(0, step, dot.chunk)]
            for chunk in chunks:
                self._prefetch(e, bases, chunk, left, places.beyond)
            self._chunks(e, block, chunks, dot.chunk)
        for start in range(whole // step * step, dot.k, dot.chunk):
            self._chunks(e, block, [const(start)], min(dot.chunk, dot.k - start))
        found = [[b.load(total) for total in line] for line in totals]
        if dot.checked:
            found = [
                dot.poisoned(e, line, b.load(slot)) for line, slot in zip(found, seen, strict=True)
            ]
        return found

    def _prefetch(
        self, e: Emitter, bases: list[Value], k: Value, left: Value, beyond: Value
    ) -> None:
        """Ask for what the runs read `prefetch` bytes later; `left` bytes of a run are still to
        read from its base.
        """
        if self._prefetch_bytes == 0:
            return
        b, dot = e.b, self.dot
        at = b.udiv(b.mul(k, const(dot.chunk_bytes)), const(dot.chunk))
        at = b.add(at, const(self._prefetch_bytes // len(bases)))
        inside = b.icmp_signed("<", at, left)
        at = b.add(at, b.select(inside, const(0), beyond))
        for base in bases:
            for line in range(0, dot.chunk_bytes, 64):
                e.prefetch(e.offset(base, b.add(at, const(line))), _L2)

    def _chunks(self, e: Emitter, block: _Block, chunks: list[Value], valid: int) -> None:
        """Add the chunks at elements `chunks`, `valid` weights of each, to the block's totals."""
        b, dot = e.b, self.dot
        lines = [(r, chunk) for chunk in chunks for r in range(len(block.bases))]
        if dot.scaled:
            sums = [[e.zeros(F32, dot.lanes)] * len(block.x) for _ in lines]
        else:
            sums = [[b.load(slot) for slot in block.totals[r]] for r, _ in lines]
        # Rows side by side share the loads of activations, where there are registers for it.
        many = dot.lanes == 16
        groups = [list(range(len(lines)))] if many else [[i] for i in range(len(lines))]
        for start in range(0, valid, dot.unit):
            for group in groups:
                at = [b.add(lines[i][1], const(start)) for i in group]
                weights = []
                for i, place in zip(group, at, strict=True):
                    r = lines[i][0]
                    codes = dot.load(e, block.bases[r], place, valid - start)
                    if dot.checked:
                        slot = block.seen[r]
                        b.store(dot.watched(e, b.load(slot), codes), slot)
                    weights.append(dot.decode(e, codes))
                for token, prepared in enumerate(block.x):
                    for step in range(len(weights[0])):
                        activations = dot.activations(e, prepared, at[0], step)
                        for i, row in zip(group, weights, strict=True):
                            sums[i][token] = dot.multiply(e, sums[i][token], row[step], activations)
        for (r, chunk), line in zip(lines, sums, strict=True):
            if dot.scaled:
                factor = dot.scale(e, block.scales[r], chunk, valid)
                line = [
                    e.fma(value, factor, b.load(slot))
                    for value, slot in zip(line, block.totals[r], strict=True)
                ]
            for value, slot in zip(line, block.totals[r], strict=True):
                b.store(value, slot)


@dataclass(frozen=True)
class _Block:
    """Rows that are summed up side by side: their addresses and those of their scales, the prepared
    tokens `x`, the slots of their totals [row][token] and of what is watched of each row.
    """

    bases: list[Value]
    scales: list[Value]
    x: list[Value]
    totals: list[list[Value]]
    seen: list[Value]


@dataclass(frozen=True)
class _Run:
    """What the rows of one tile have in common.

    The first run ends at row `end`, each has `rows` rows; `beyond` bytes lie between `end` and
    where reading goes on.
    """

    w: Value
    scale: Value
    start: Value
    end: Value
    rows: Value
    beyond: Value
    out: Value
    out_stride: Value


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
