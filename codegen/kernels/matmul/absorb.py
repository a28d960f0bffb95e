"""`mla_absorb`: q_latent = q_nope . W_UK, a sum of weight rows: rows are streamed in memory order,
sums stay in cache.

A few rows at a time are decoded once for all tokens. A token's sum runs over the rows in ascending
order whatever the batch or the split, and block scales go into the query, which is small.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.weights import row_bytes, scales_of, weights_f32
from hmc.codegen.ir import F32, I16, Emitter, Value, const, vec
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import lanes_mask, resize

_BLOCK = 128
"""Columns that are never shared between workers, and that one scale covers."""


@dataclass(frozen=True)
class _Unit:
    """A few weights of a row as f32 vectors; byte tables leave fp8 in an order of their own."""

    spec: KernelSpec

    @property
    def lanes(self) -> int:
        return self.spec.tier.lanes

    @property
    def tables(self) -> bool:
        """Whether 64 codes are looked up in byte tables at once (dot.py)."""
        dot = Dot(self.spec, self.spec["rank"])
        return dot.paired and dot.unit == 4 * self.lanes

    @property
    def size(self) -> int:
        """Weights of a unit."""
        return 4 * self.lanes if self.tables else 2 * self.lanes

    def load(self, e: Emitter, row: Value, index: Value, valid: int) -> list[Value]:
        """Weights [index, index + valid) of `row`; zeros behind them."""
        if not self.tables:
            found = weights_f32(e, self.spec.weight, row, index, valid)
            blank = e.zeros(F32, self.lanes)
            return found + [blank] * (self.size // self.lanes - len(found))
        words = Dot(self.spec, self.spec["rank"]).weights(e, row, index, valid)
        zero = e.zeros(I16, 32)
        return [
            e.b.bitcast(e.b.shuffle_vector(zero, word, self._widen(half)), vec(F32, 16))
            for word in words
            for half in range(2)
        ]

    @staticmethod
    def _widen(half: int) -> Value:
        """bf16 words to f32: zeros below, in 128-bit groups."""
        return lanes_mask(
            [
                group * 8 + half * 4 + item // 2 + item % 2 * 32
                for group in range(4)
                for item in range(8)
            ]
        )

    def restore(self, e: Emitter, vectors: list[Value]) -> Value:
        """The unit's vectors as one, in the order of the row."""
        while len(vectors) > 1:
            count = vectors[0].type.count
            mask = lanes_mask(list(range(2 * count)))
            vectors = [
                e.b.shuffle_vector(left, right, mask)
                for left, right in zip(vectors[::2], vectors[1::2], strict=True)
            ]
        if not self.tables:
            return vectors[0]
        order = [
            vector * 16 + group * 4 + item
            for group in range(4)
            for vector in range(4)
            for item in range(4)
        ]
        return e.b.shuffle_vector(vectors[0], vectors[0], lanes_mask(order))


def emit_mla_absorb(e: Emitter) -> None:
    """`mla_absorb`: split by (head, `_BLOCK` columns). Tile: rows at once, prefetch rows ahead."""
    b, spec = e.b, e.spec
    heads, nope, v_dim, rank = (spec[name] for name in ("heads", "nope", "v_dim", "rank"))
    rows, tokens = spec.tiled("rows", 4), e.arg["tokens"]
    unit = _Unit(spec)
    blocks = -(-rank // _BLOCK)
    padded = blocks * _BLOCK
    sums = e.local(F32, count=spec["tokens"] * padded)
    factors = e.local(F32, count=spec["tokens"] * rows)
    for slot in (sums, factors):
        slot.align = 64
    start, stop = e.split(const(heads * blocks))
    head_stop = b.udiv(b.add(stop, const(blocks - 1)), const(blocks))
    nest = _Nest(e, unit, sums, factors, padded)
    with e.for_range(b.udiv(start, const(blocks)), head_stop) as head:
        begin = b.mul(head, const(blocks))
        low = b.sub(start, begin)
        low = b.select(b.icmp_signed("<", low, const(0)), const(0), low)
        high = e.minimum(b.sub(stop, begin), const(blocks))
        with e.for_range(0, b.mul(tokens, const(padded)), unit.lanes) as index:
            e.store(e.zeros(F32, unit.lanes), sums, index)
        first_row = b.mul(head, const(nope + v_dim))
        whole = nope // rows * rows
        if whole:
            with e.for_range(0, whole, rows) as d:
                nest.add_rows(head, first_row, d, rows, low, high)
        if whole < nope:
            nest.add_rows(head, first_row, const(whole), nope - whole, low, high)
        with e.for_range(0, tokens) as token:
            target = b.mul(b.add(b.mul(token, const(heads)), head), const(rank))
            nest.store(token, e.at(e.arg["q_latent"], target, F32), low, high)


class _Nest:
    """The inner loops: some rows by a range of column blocks, for all tokens."""

    def __init__(self, e: Emitter, unit: _Unit, sums: Value, factors: Value, padded: int) -> None:
        self.e, self.unit, self.sums, self.factors, self.padded = e, unit, sums, factors, padded
        self.rank = e.spec["rank"]
        self.row_bytes = row_bytes(e.spec.weight, self.rank)
        self.scales = scales_of(e.spec)
        # Scales that cover a block of columns go into the query, which is small.
        self.in_queries = self.scales.rows > 1 and self.scales.columns % _BLOCK == 0

    def add_rows(
        self, head: Value, first_row: Value, d: Value, rows: int, low: Value, high: Value
    ) -> None:
        """sums[t, :] += q[t, head, d + j] * row[first_row + d + j, :] for j < `rows`, in blocks
        [low, high).
        """
        e, b, spec = self.e, self.e.b, self.e.spec
        row = b.add(first_row, d)
        base = e.offset(e.arg["w"], b.mul(row, const(self.row_bytes)))
        lines = [e.offset(base, const(j * self.row_bytes)) for j in range(rows)]
        ahead = spec.tiled("prefetch", 32)
        # Past the last row of this head the next head's follow, behind the rows of W_UV.
        over = b.icmp_signed(">=", b.add(d, const(ahead)), const(spec["nope"]))
        skip = b.select(over, const(ahead + spec["v_dim"]), const(ahead))
        fetch = e.offset(base, b.mul(skip, const(self.row_bytes)))
        whole = self.rank // _BLOCK
        with e.for_range(low, e.minimum(high, const(whole))) as block:
            self._block(head, d, row, lines, fetch, block, _BLOCK)
        if whole * _BLOCK < self.rank:
            with b.if_then(b.icmp_signed(">", high, const(whole))):
                self._block(head, d, row, lines, fetch, const(whole), self.rank - whole * _BLOCK)

    def _block(
        self,
        head: Value,
        d: Value,
        row: Value,
        lines: list[Value],
        fetch: Value,
        block: Value,
        width: int,
    ) -> None:
        e, b = self.e, self.e.b
        tokens = e.arg["tokens"]
        self._scale_queries(head, d, row, len(lines), block)
        column = b.mul(block, const(_BLOCK))
        size = self.row_bytes * _BLOCK // self.rank
        for j in range(len(lines)):
            place = e.offset(fetch, b.mul(block, const(size)))
            for line in range(0, size, 64):
                e.prefetch(e.offset(place, const(j * self.row_bytes + line)), 2)

        def strip(index: Value, valid: int) -> None:
            weights = [self.unit.load(e, line, index, valid) for line in lines]
            if self.scales.columns and not self.in_queries:
                weights = [
                    self._scaled(vectors, b.add(row, const(j)), index)
                    for j, vectors in enumerate(weights)
                ]
            with e.for_range(0, tokens) as token:
                at = b.add(b.mul(token, const(self.padded)), index)
                places = [b.add(at, const(v * self.unit.lanes)) for v in range(len(weights[0]))]
                totals = [e.load_vec(self.sums, p, F32, self.unit.lanes, 4) for p in places]
                for j, decoded in enumerate(weights):
                    factor_at = b.add(b.mul(token, const(len(lines))), const(j))
                    factor = e.splat(e.load(self.factors, factor_at, F32, 4), self.unit.lanes)
                    totals = [
                        e.fma(value, factor, total)
                        for value, total in zip(decoded, totals, strict=True)
                    ]
                for total, place in zip(totals, places, strict=True):
                    e.store(total, self.sums, place, 4)

        whole = width // self.unit.size * self.unit.size
        if whole:
            with e.for_range(0, whole, self.unit.size) as offset:
                strip(b.add(column, offset), self.unit.size)
        if whole < width:
            strip(b.add(column, const(whole)), width - whole)

    def _scaled(self, vectors: list[Value], row: Value, index: Value) -> list[Value]:
        """Weights times their scales: one for the unit, or one for each vector of it."""
        each = len(vectors) if self.scales.columns % self.unit.size == 0 else 1
        found = []
        for at in range(0, len(vectors), each):
            start = self.e.b.add(index, const(at * self.unit.lanes)) if at else index
            group = self.e.b.udiv(start, const(self.scales.columns))
            spread = self.e.splat(self._scale(row, group), self.unit.lanes)
            found += [self.e.b.fmul(vector, spread) for vector in vectors[at : at + each]]
        return found

    def _scale(self, row: Value, group: Value) -> Value:
        """Scale number `group` of a row, f32."""
        e, b = self.e, self.e.b
        across = const(-(-self.rank // self.scales.columns))
        at = b.add(b.mul(self.scales.row_of(e, row), across), group)
        if self.scales.bytes == 2:
            return e.bf16_to_f32(e.load(e.arg["scale"], at, I16))
        return e.load(e.arg["scale"], at, F32)

    def _scale_queries(self, head: Value, d: Value, row: Value, rows: int, block: Value) -> None:
        """factors[t][j] = q[t, head, d + j], times the scale of that row in `block` where one
        covers it.
        """
        e, b, spec = self.e, self.e.b, self.e.spec
        scales = e.zeros(F32, rows)
        wide = self.scales.columns // _BLOCK
        group = b.udiv(block, const(wide)) if wide > 1 else block
        for j in range(rows if self.in_queries else 0):
            scale = self._scale(b.add(row, const(j)), group)
            scales = b.insert_element(scales, scale, const(j))
        column = b.add(b.mul(head, const(spec["nope"] + spec["rope"])), d)
        with e.for_range(0, e.arg["tokens"]) as token:
            at = b.add(b.mul(token, e.arg["q_stride"]), column)
            value = e.load_vec(e.arg["q"], at, F32, rows)
            if self.in_queries:
                value = b.fmul(value, scales)
            e.store(value, self.factors, b.mul(token, const(rows)), 4)

    def store(self, token: Value, target: Value, low: Value, high: Value) -> None:
        """target[blocks low to high] = sums[token], in order."""
        e, b = self.e, self.e.b
        size, lanes = self.unit.size, self.unit.lanes

        def strip(index: Value, valid: int) -> None:
            at = b.add(b.mul(token, const(self.padded)), index)
            vectors = [
                e.load_vec(self.sums, b.add(at, const(start)), F32, lanes, 4)
                for start in range(0, size, lanes)
            ]
            e.store(resize(e, self.unit.restore(e, vectors), valid), target, index)

        whole = self.rank // size * size
        end = b.mul(high, const(_BLOCK))
        with e.for_range(b.mul(low, const(_BLOCK)), e.minimum(end, const(whole)), size) as index:
            strip(index, size)
        if whole < self.rank:
            with b.if_then(b.icmp_signed(">", end, const(whole))):
                strip(const(whole), self.rank - whole)
