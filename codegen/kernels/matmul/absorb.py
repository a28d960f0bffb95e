"""`mla_absorb`: q_latent = q_nope . W_UK, a sum of weight rows: rows are streamed in memory order,
sums stay in cache.

A few rows at a time are decoded once for all tokens. A token's sum runs over the rows in ascending
order whatever the batch or the split, and block scales go into the query, which is small.
"""

from __future__ import annotations

from functools import partial

from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.lanes import over_lanes
from hmc.codegen.formats.order import has_order, order_of
from hmc.codegen.formats.pairs import middle_of
from hmc.codegen.formats.planes import ALL, Beside, Row
from hmc.codegen.formats.weights import weights_f32
from hmc.codegen.ir import F32, I16, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.vector import concat, for_blocks, fsplat, resize, unpack_masks

_BLOCK = 128
"""Columns that are never shared between workers."""


def emit_mla_absorb(e: Emitter) -> None:
    """`mla_absorb`: split by (head, `_BLOCK` columns). Tile: rows at once, prefetch rows ahead."""
    b, spec = e.b, e.spec
    heads, nope, v_dim, rank = (spec[name] for name in ("heads", "nope", "v_dim", "rank"))
    tokens = e.arg["tokens"]
    nest = _Nest(e)
    blocks = nest.padded // _BLOCK
    start, stop = e.split(const(heads * blocks))
    head_stop = b.udiv(b.add(stop, const(blocks - 1)), const(blocks))
    with e.for_range(b.udiv(start, const(blocks)), head_stop) as head:
        begin = b.mul(head, const(blocks))
        low = e.positive(b.sub(start, begin))
        high = e.minimum(b.sub(stop, begin), const(blocks))
        with e.for_range(0, b.mul(tokens, const(nest.padded)), e.lanes) as index:
            e.store(e.zeros(F32, e.lanes), nest.sums, index)
        first_row = b.mul(head, const(nope + v_dim))

        def add_rows(d: Value, rows: int) -> None:
            nest.add_rows(head, first_row, d, rows, low, high)

        for_blocks(e, nope, nest.rows, add_rows)
        with e.for_range(0, tokens) as token:
            target = b.mul(b.add(b.mul(token, const(heads)), head), const(rank))
            nest.store(token, e.at(e.arg["q_latent"], target, F32), low, high)


class _Nest:
    """The inner loops: some rows by a range of column blocks, for all tokens.

    Rows are decoded to f32 by units of `_size` weights, which byte tables (pairs.py) leave in an
    order of their own.
    """

    def __init__(self, e: Emitter) -> None:
        spec = e.spec
        self.e, self.rank, self.rows = e, spec["rank"], spec.tiled("rows", 4)
        self._dot = Dot(spec, self.rank)
        self._tables = self._dot.pairs is not None and self._dot.unit == 4 * e.lanes
        self._size = self._dot.unit if self._tables else 2 * e.lanes
        self.padded = -(-self.rank // _BLOCK) * _BLOCK
        self.sums = e.buffer(F32, spec["tokens"] * self.padded)
        self._factors = e.buffer(F32, spec["tokens"] * self.rows)
        self._planes = self._dot.planes if self._dot.native else ()
        # Scales that cover a block of columns go into the query, which is small.
        self._in_queries = all(
            plane.kind == "scale"
            and plane.columns % _BLOCK == 0
            and (plane.rows > 1 or plane.columns == ALL)
            for plane in self._planes
            if plane.kind != "order"
        )

    def add_rows(
        self, head: Value, first_row: Value, d: Value, rows: int, low: Value, high: Value
    ) -> None:
        """sums[t, :] += q[t, head, d + j] * row[first_row + d + j, :] for j < `rows`, in blocks
        [low, high).
        """
        e, b, spec = self.e, self.e.b, self.e.spec
        row, row_bytes = b.add(first_row, d), self._dot.row_bytes
        matrix = e.arg["w"], e.arg["scale"]
        lines = [self._dot.row(e, matrix, b.add(row, const(j))) for j in range(rows)]
        ahead = spec.tiled("prefetch", 32)
        # Past the last row of this head the next head's follow, behind the rows of W_UV.
        over = b.icmp_signed(">=", b.add(d, const(ahead)), const(spec["nope"]))
        skip = b.select(over, const(ahead + spec["v_dim"]), const(ahead))
        fetch = e.offset(lines[0].codes, b.mul(skip, const(row_bytes)))
        add = partial(self._block, head, d, lines, fetch)
        whole = self.rank // _BLOCK
        with e.for_range(low, e.minimum(high, const(whole))) as block:
            add(block, _BLOCK)
        if whole * _BLOCK < self.rank:
            with b.if_then(b.icmp_signed(">", high, const(whole))):
                add(const(whole), self.rank - whole * _BLOCK)

    def _block(
        self,
        head: Value,
        d: Value,
        lines: list[Row],
        fetch: Value,
        block: Value,
        width: int,
    ) -> None:
        e, b, row_bytes = self.e, self.e.b, self._dot.row_bytes
        self._scale_queries(head, d, lines, block)
        column = b.mul(block, const(_BLOCK))
        size = row_bytes * _BLOCK // self.rank
        for j in range(len(lines)):
            place = e.offset(fetch, b.mul(block, const(size)))
            for line in range(0, size, 64):
                e.prefetch(e.offset(place, const(j * row_bytes + line)), 2)

        def unit(offset: Value, valid: int) -> None:
            index = b.add(column, offset)
            weights = [self._load(line, index, valid) for line in lines]
            if not self._in_queries:
                weights = [
                    self._scaled(vectors, line, index, valid)
                    for line, vectors in zip(lines, weights, strict=True)
                ]
            with e.for_range(0, e.arg["tokens"]) as token:
                at = b.add(b.mul(token, const(self.padded)), index)
                places = [b.add(at, const(v * e.lanes)) for v in range(len(weights[0]))]
                totals = [e.load_vec(self.sums, p, F32, e.lanes, 4) for p in places]
                for j, decoded in enumerate(weights):
                    factor_at = b.add(b.mul(token, const(len(lines))), const(j))
                    factor = e.splat(e.load(self._factors, factor_at, F32, 4), e.lanes)
                    totals = [
                        e.fma(value, factor, total)
                        for value, total in zip(decoded, totals, strict=True)
                    ]
                for total, place in zip(totals, places, strict=True):
                    e.store(total, self.sums, place, 4)

        for_blocks(e, width, self._size, unit)

    def _load(self, row: Row, index: Value, valid: int) -> list[Value]:
        """A unit of `row`: weights [index, index + valid); zeros behind them."""
        e = self.e
        if not self._tables:
            found = weights_f32(e, e.spec, row, index, valid)
            return found + [e.zeros(F32, e.lanes)] * (self._size // e.lanes - len(found))
        zero = e.zeros(I16, 32)  # the lower half of an f32
        return [
            e.b.bitcast(e.b.shuffle_vector(zero, word, mask), vec(F32, 16))
            for word in self._dot.decode(e, self._dot.load(e, row, index, valid))
            for mask in unpack_masks(32)
        ]

    def _scaled(self, vectors: list[Value], row: Row, index: Value, valid: int) -> list[Value]:
        """Weights less their zeros and times their scales."""
        b, lanes = self.e.b, self.e.lanes
        middle = fsplat(middle_of(self._dot.format) if self._tables else 0.0, lanes)
        planes = list(zip(self._planes, row.planes, strict=True))
        for plane, base in planes:
            if plane.kind == "zero":
                zeros = self._beside(plane, base, index, valid, len(vectors))
                vectors = [
                    b.fsub(vector, b.fsub(zero, middle))
                    for vector, zero in zip(vectors, zeros, strict=True)
                ]
        for plane, base in planes:
            if plane.kind == "scale":
                scales = self._beside(plane, base, index, valid, len(vectors))
                vectors = [b.fmul(*both) for both in zip(vectors, scales, strict=True)]
        return vectors

    def _beside(
        self, plane: Beside, base: Value, index: Value, valid: int, count: int
    ) -> list[Value]:
        """What covers the weights of a unit, for each of its `count` vectors: one for all, or one
        for each. Of byte tables lanes are alike in all vectors: those of the same 16 columns.
        """
        e, b, columns = self.e, self.e.b, plane.columns
        at = b.udiv(index, const(columns))
        if columns % self._size == 0:
            return [e.splat(plane.load(e, base, at), e.lanes)] * count
        if self._tables:
            groups = self._size // columns
            return [over_lanes(e, plane, base, at, groups, -(-valid // columns))] * count

        def number(start: int) -> Value:
            return b.udiv(b.add(index, const(start)), const(columns))

        return [
            e.splat(plane.load(e, base, number(start)), e.lanes)
            if start < valid
            else e.zeros(F32, e.lanes)
            for start in range(0, count * e.lanes, e.lanes)
        ]

    def _scale_queries(self, head: Value, d: Value, lines: list[Row], block: Value) -> None:
        """factors[t][j] = q[t, head, d + j], times the scale of that row in `block` where one
        covers it.
        """
        e, b, spec, rows = self.e, self.e.b, self.e.spec, len(lines)
        inside = self._planes if self._in_queries else ()
        scales = None
        for at, plane in enumerate(inside):
            if plane.kind == "order":
                continue
            wide, found = plane.columns // _BLOCK, e.zeros(F32, rows)
            group = b.udiv(block, const(wide)) if wide > 1 else block
            for j, line in enumerate(lines):
                found = b.insert_element(found, plane.load(e, line.planes[at], group), const(j))
            scales = found if scales is None else b.fmul(scales, found)
        column = b.add(b.mul(head, const(spec["nope"] + spec["rope"])), d)
        with e.for_range(0, e.arg["tokens"]) as token:
            at = b.add(b.mul(token, e.arg["q_stride"]), column)
            value = e.load_vec(e.arg["q"], at, F32, rows)
            if scales is not None:
                value = b.fmul(value, scales)
            e.store(value, self._factors, b.mul(token, const(rows)), 4)

    def store(self, token: Value, target: Value, low: Value, high: Value) -> None:
        """target[blocks low to high] = sums[token], in order."""
        e, b, size = self.e, self.e.b, self._size
        ordered = has_order(self._dot.planes)
        columns = order_of(e, self._dot.planes, e.arg["scale"]) if ordered else None

        def unit(index: Value, valid: int) -> None:
            at = b.add(b.mul(token, const(self.padded)), index)
            starts = range(0, size, e.lanes)
            row = concat(
                e, [e.load_vec(self.sums, b.add(at, const(s)), F32, e.lanes, 4) for s in starts]
            )
            if self._tables:
                each = range(4)
                order = [v * 16 + group * 4 + item for group in each for v in each for item in each]
                row = b.shuffle_vector(row, row, lanes_mask(order))
            if columns is None:
                e.store(resize(e, row, valid), target, index)
                return
            e.store(row, self.sums, at, 4)
            with e.for_range(0, valid) as lane:
                value = e.load(self.sums, b.add(at, lane), F32, 4)
                e.store(value, target, e.load_int(columns, b.add(index, lane)), 4)

        whole = self.rank // size * size
        end = b.mul(high, const(_BLOCK))
        with e.for_range(b.mul(low, const(_BLOCK)), e.minimum(end, const(whole)), size) as index:
            unit(index, size)
        if whole < self.rank:
            with b.if_then(b.icmp_signed(">", end, const(whole))):
                unit(const(whole), self.rank - whole)
