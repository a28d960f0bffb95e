"""Scores and softmax of an attention task, with heads in the lanes.

A key element is broadcast, the queries are transposed once a task, and softmax needs no sums across
lanes.

    dot form   pairs of bf16 through `vdpbf16ps`. Queries enter as `terms` bf16 terms
               (2: the value and what rounding left, error 2^-17), probabilities rounded to bf16
               with the sum taken over the rounded ones.
    fma form   f32 multiply-add, keys widened to f32 a tile at a time
"""

from __future__ import annotations

from functools import partial

from hmc.codegen.ir import BF16, F32, I16, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.kernels.attention.attend_rows import (
    L1,
    L2,
    NEVER,
    PARTITION,
    Rows,
    Shape,
    Source,
    pair_words,
)
from hmc.codegen.kernels.attention.options import capped, grown
from hmc.codegen.vector import copy_row, exp, fmax, for_blocks, fsplat, load_part


class Scores:
    """From queries and keys to `weights`: e**(score - maximum) [position][lane], f32 or bf16 pairs
    of positions.
    """

    def __init__(self, e: Emitter, shape: Shape, source: Source, rows: Rows) -> None:
        self.e, self.shape, self.source, self.rows = e, shape, source, rows
        s = shape
        size = (s.key // s.step + s.lanes) * s.width
        self.queries = [e.buffer(s.word, size) for _ in range(s.terms if s.dot else 1)]
        self.scores = e.buffer(F32, (PARTITION + s.tile) * s.width)
        self.weights = e.buffer(s.word, (PARTITION + s.tile) * s.width)
        self.wide = None if s.dot else e.buffer(F32, s.tile * s.key)

    def emit(self, token: Value, head: Value, skip: Value, count: Value) -> tuple[Value, Value]:
        """Code for the group from `head` on and positions [skip, count); returns (maxima, sums) by
        lane.
        """
        self._pack_queries(token, head)
        maximum = self._score(token, skip, count)
        return maximum, self._exponentials(skip, count, maximum)

    # -- queries -----------------------------------------------------------------------------------

    def _pack_queries(self, token: Value, head: Value) -> None:
        """queries[term][key step][head lane], zero in lanes without a head."""
        e, b, s = self.e, self.e.b, self.shape
        size = s.step * s.lanes
        begin = 0
        for address, width in self.source.segments:
            rows = [address(token, b.add(head, const(lane))) for lane in range(s.members)]
            # Zeros behind a segment are overwritten by the next one or lie past the key.
            for_blocks(e, width, size, partial(self._pack_square, rows, begin))
            begin += width

    def _pack_square(self, rows: list[Value], begin: int, start: Value, count: int) -> None:
        """Elements [start, start + count) of the rows of the segment at `begin` to key steps."""
        e, b, s = self.e, self.e.b, self.shape
        size = s.step * s.lanes
        blank = e.zeros(s.word, s.lanes)
        terms: list[list[Value]] = [[blank] * s.width for _ in self.queries]
        for lane, row in enumerate(rows):
            value = load_part(e, row, start, F32, count, size)
            for term in terms:
                if s.dot:
                    bits = round_bf16(e, value)
                    term[lane] = b.bitcast(bits, vec(I32, s.lanes))
                    value = b.fsub(value, e.bf16_to_f32(bits))
                else:
                    term[lane] = value
        at = b.mul(b.udiv(b.add(start, const(begin)), const(s.step)), const(s.width))
        for query, term in zip(self.queries, terms, strict=True):
            for index, column in enumerate(_shuffle(e, term)):
                e.store(column, query, b.add(at, const(index * s.lanes)))

    # -- scores ------------------------------------------------------------------------------------

    def _score(self, token: Value, skip: Value, count: Value) -> Value:
        """scores[position][lane] = scale * (query . key), or what the spec's expression makes of
        it; -inf where not attended; returns the maxima.
        """
        e, b, s = self.e, self.e.b, self.shape
        kind = vec(F32, s.width)
        never = fsplat(NEVER, s.width)
        factor = grown(e, e.arg["scale"], e.load_int(e.arg["positions"], token))
        scale = e.splat(factor, s.width)
        maximum = e.local(kind, never)
        start = b.mul(b.udiv(skip, const(s.tile)), const(s.tile))
        steps = s.key // s.step
        with e.for_range(start, count, s.tile) as position:
            keys = self.rows.address(self.source.keys, s.key, position)
            after = self.rows.address(self.source.keys, s.key, b.add(position, const(s.tile)))
            ahead = [(after, s.tile * 2 * s.key, L1)]
            if self.source.values_apart:
                values = self.rows.address(self.source.values, s.value_row, position)
                ahead.append((values, s.tile * 2 * s.value_row, L2))
            words = keys
            if self.wide is not None:
                self._widen(keys)
                words = self.wide
            sums = [e.local(kind, e.zeros(F32, s.width)) for _ in range(s.tile)]
            with e.for_range(0, steps) as step:
                for base, size, level in ahead:
                    self._prefetch_slice(base, size, level, step, steps)
                query = [
                    e.load_vec(q, b.mul(step, const(s.width)), s.word, s.width, align=4 * s.width)
                    for q in self.queries
                ]
                for row in range(s.tile):
                    total = b.load(sums[row])
                    at = b.add(step, const(row * s.key // s.step))
                    one = e.splat(e.load(words, at, s.word, align=4), s.width)
                    for q in query:
                        total = s.multiply_add(e, total, q, one)
                    b.store(total, sums[row])
            for row in range(s.tile):
                where = b.add(position, const(row))
                valid = b.and_(b.icmp_signed("<", where, count), b.icmp_signed(">=", where, skip))
                score = b.fmul(b.load(sums[row]), scale)
                score = capped(e, score) if e.spec.expr else score
                score = b.select(valid, score, never)
                e.store(score, self.scores, b.mul(where, const(s.width)), align=4 * s.width)
                b.store(fmax(e, score, b.load(maximum)), maximum)
        return b.load(maximum)

    def _prefetch_slice(self, base: Value, size: int, level: int, step: Value, steps: int) -> None:
        """Fetch the part of [base, base + size) that falls to `step` of `steps`: traffic spread
        evenly.
        """
        e, b = self.e, self.e.b
        lines = -(-size // 64)
        if lines >= steps:
            each = -(-lines // steps)
            first = b.mul(step, const(64 * each))
        else:
            each = 1
            first = b.mul(b.udiv(step, const(steps // lines)), const(64))
        for line in range(each):
            e.prefetch(e.offset(base, b.add(first, const(64 * line))), level)

    def _widen(self, keys: Value) -> None:
        """wide[row][:] = the tile's keys as f32."""
        e, s = self.e, self.shape
        for row in range(s.tile):
            source = e.offset(keys, const(2 * row * s.key))
            target = e.at(self.wide, const(row * s.key), F32)

            copy_row(e, "bf16", source, "f32", target, s.key, 4)

    # -- softmax -----------------------------------------------------------------------------------

    def _exponentials(self, skip: Value, count: Value, maximum: Value) -> Value:
        """weights[position (pair)][lane] = e**(score - maximum), as bf16 pairs or f32; returns the
        sums.
        """
        e, b, s = self.e, self.e.b, self.shape
        both = 2 * s.width
        halves = [lanes_mask(list(range(at, at + s.width))) for at in (0, s.width)]
        twice = lanes_mask([lane % s.width for lane in range(both)])
        top = b.shuffle_vector(maximum, maximum, twice)
        total = e.local(vec(F32, both), e.zeros(F32, both))
        # Two neighbouring positions are one vector; behind the last position scores are -inf.
        with e.for_range(b.and_(skip, const(-2)), count, 2) as position:
            at = b.mul(position, const(s.width))
            score = e.load_vec(self.scores, at, F32, both, align=8 * s.width)
            weight = exp(e, b.fsub(score, top))
            if s.dot:
                bits = round_bf16(e, weight)
                weight = e.bf16_to_f32(bits)
                pairs = pair_words(e, *(b.shuffle_vector(bits, bits, half) for half in halves))
                e.store(pairs, self.weights, b.udiv(at, const(2)), align=4 * s.width)
            else:
                e.store(weight, self.weights, at, align=8 * s.width)
            b.store(b.fadd(b.load(total), weight), total)
        sums = b.load(total)
        return b.fadd(*(b.shuffle_vector(sums, sums, half) for half in halves))


def round_bf16(e: Emitter, value: Value) -> Value:
    """f32 to bf16 bits by the instruction of the dot form's tier."""
    count = value.type.count
    return e.b.bitcast(e.b.fptrunc(value, vec(BF16, count)), vec(I16, count))


def _shuffle(e: Emitter, rows: list[Value]) -> list[Value]:
    """Rows [width][lanes] to the same elements in the order [lanes][width], as `width` vectors:
    perfect shuffles.
    """
    lanes, width = rows[0].type.count, len(rows)
    low = [lane // 2 + lane % 2 * lanes for lane in range(lanes)]
    masks = [lanes_mask(low), lanes_mask([lane + lanes // 2 for lane in low])]
    turns = (width - 1).bit_length()
    for _ in range(turns):
        rows = [
            e.b.shuffle_vector(rows[index], rows[index + width // 2], mask)
            for index in range(width // 2)
            for mask in masks
        ]
    return rows
