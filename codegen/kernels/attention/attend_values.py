"""Results of an attention task, with the value's dimensions in the lanes and sums in registers.

In the dot form two positions are multiplied at once: their value rows are interleaved by unpacking,
which orders dimensions by 128-bit groups until the sums are put back in order.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.kernels.attention.attend_rows import L2, Rows, Shape, Source, pair_words
from hmc.codegen.vector import load_part, resize, unpack_masks


@dataclass(frozen=True)
class Results:
    """From `weights` (attend_scores.py) and values to a record; fetches the keys of `next_rows`
    meanwhile.
    """

    e: Emitter
    shape: Shape
    source: Source
    weights: Value
    rows: Rows
    next_rows: Rows | None

    def emit(self, skip: Value, count: Value, record: Value) -> None:
        """record[member][:] = sum over positions of weight * value, tile by tile of heads x
        dimensions.
        """
        e, s = self.e, self.shape
        tall = min(s.members, s.sums // 2)
        strips = min(max(s.sums // tall, 2), 4) & ~1
        span = strips * s.lanes
        whole = s.value // span * span
        heads = s.members // tall * tall
        tile = partial(self._result_tile, skip, count, record)
        if whole:
            with e.for_range(0, whole, span) as column:
                with e.for_range(0, heads, tall) as head:
                    tile(head, tall, column, span)
                if heads < s.members:
                    tile(const(heads), s.members - heads, column, span)
        if whole < s.value:
            for first in range(0, s.members, tall):
                high = min(tall, s.members - first)
                tile(const(first), high, const(whole), s.value - whole)

    def _result_tile(
        self,
        skip: Value,
        count: Value,
        record: Value,
        head: Value,
        tall: int,
        column: Value,
        span: int,
    ) -> None:
        """`tall` heads from `head` on, `span` dimensions from `column` on, summed over all
        positions in registers.
        """
        e, b, s = self.e, self.e.b, self.shape
        columns = _columns(span, s.lanes, paired=s.dot)
        kind = vec(F32, s.lanes)
        vectors = sum(len(offsets) for offsets, _ in columns)
        sums = [[e.local(kind, e.zeros(F32, s.lanes)) for _ in range(vectors)] for _ in range(tall)]

        def multiply(values: Value, position: Value, rows: int) -> None:
            loaded = self._load_values(values, columns, column, rows)
            at = b.mul(b.udiv(position, const(s.step)), const(s.width))
            for h in range(tall):
                index = b.add(at, b.add(head, const(h)))
                one = e.splat(e.load(self.weights, index, s.word, align=4), s.lanes)
                for slot, value in zip(sums[h], loaded, strict=True):
                    b.store(s.multiply_add(e, b.load(slot), one, value), slot)

        start = b.mul(b.udiv(skip, const(s.run)), const(s.run))
        with e.for_range(start, count, s.run) as run:
            base = self.rows.address(self.source.values, s.value_row, run)
            stop = e.minimum(b.sub(count, run), const(s.run))
            begin = e.positive(b.sub(b.and_(skip, const(-2)), run))
            even = b.and_(stop, const(-s.step))
            ahead = self._next_keys(run)
            with e.for_range(begin, even, s.step) as within:
                if ahead is not None:
                    self._fetch_keys(ahead, within, column, span)
                values = e.offset(base, b.mul(within, const(2 * s.value_row)))
                multiply(values, b.add(run, within), s.step)
            if s.step == 2:
                with b.if_then(b.icmp_signed("<", even, stop)):
                    values = e.offset(base, b.mul(even, const(2 * s.value_row)))
                    multiply(values, b.add(run, even), 1)
        for h in range(tall):
            target = e.at(record, b.mul(b.add(head, const(h)), const(s.value)), F32)
            vector = 0
            for offsets, _ in columns:
                parts = [b.load(slot) for slot in sums[h][vector : vector + len(offsets)]]
                vector += len(offsets)
                if len(parts) == 2:
                    parts = [b.shuffle_vector(*parts, mask) for mask in _zip_masks(s.lanes)]
                for part, offset in zip(parts, offsets, strict=True):
                    used = min(s.lanes, span - offset)
                    e.store(resize(e, part, used), target, b.add(column, const(offset)))

    def _next_keys(self, run: Value) -> Value | None:
        """Address of the next task's keys at the partition's position `run`."""
        if self.next_rows is None:
            return None
        return self.next_rows.address(self.source.keys, self.shape.key, run)

    def _fetch_keys(self, keys: Value, within: Value, column: Value, span: int) -> None:
        """Fetch the share of `step` next key rows that falls to `span` dimensions of the value."""
        e, b, s = self.e, self.e.b, self.shape
        row_bytes = 2 * s.key * s.step
        share = b.udiv(b.mul(column, const(row_bytes)), const(s.value))
        start = e.offset(keys, b.add(b.mul(within, const(2 * s.key)), share))
        for line in range(-(-row_bytes * span // (64 * s.value))):
            e.prefetch(e.offset(start, const(64 * line)), L2)

    def _load_values(
        self, values: Value, columns: list[tuple[list[int], int]], column: Value, rows: int
    ) -> list[Value]:
        """The operand vectors of one position (fma form) or pair of positions (dot form; `rows` 1:
        the second is 0).
        """
        e, b, s = self.e, self.e.b, self.shape
        found = []
        for offsets, size in columns:
            at = b.add(column, const(offsets[0]))
            lanes = s.lanes * len(offsets)
            first = load_part(e, values, at, I16, size, lanes)
            if not s.dot:
                found.append(e.bf16_to_f32(first))
                continue
            second = (
                load_part(e, values, b.add(at, const(s.value_row)), I16, size, lanes)
                if rows == 2
                else e.zeros(I16, lanes)
            )
            if len(offsets) == 2:
                for mask in unpack_masks(lanes, lanes // 8):
                    mixed = b.shuffle_vector(first, second, mask)
                    found.append(b.bitcast(mixed, vec(I32, s.lanes)))
            else:
                found.append(pair_words(e, first, second))
        return found


def _columns(span: int, lanes: int, *, paired: bool) -> list[tuple[list[int], int]]:
    """Cut `span` dimensions into operand loads: (offsets of the vectors made of it, elements
    loaded).
    """
    cut = []
    offset = 0
    while offset < span:
        if paired and span - offset >= 2 * lanes:
            cut.append(([offset, offset + lanes], 2 * lanes))
            offset += 2 * lanes
        else:
            cut.append(([offset], min(lanes, span - offset)))
            offset += lanes
    return cut


def _zip_masks(lanes: int) -> list[Value]:
    """Undo `unpack_masks` on the two sums: group g of the result is half g % 2 of 128-bit group g
    // 2.
    """
    order = [
        (group // 2) * 4 + item + group % 2 * lanes
        for group in range(2 * lanes // 4)
        for item in range(4)
    ]
    return [lanes_mask(order[:lanes]), lanes_mask(order[lanes:])]
