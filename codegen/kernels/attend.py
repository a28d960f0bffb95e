"""The attention core that grouped-query and latent attention share: queries of some heads against one run of cache rows.

The context is cut into partitions of `PARTITION` positions, the same for every token, batch and number of workers. A
task is (token, partition, head group): its heads all read the same cache rows, which are read once for keys and once
(out of the cache) for values. It writes a record: running maximum, sum and unnormalised result. `emit_join` merges a
token's records in ascending order (the log-sum-exp merge of split softmax). So results depend on nothing but the token.

Scores are computed with heads in the lanes: a cache element is broadcast, the queries are transposed once a task, and
softmax needs no sums across lanes. Results are computed with the value's dimensions in the lanes.

    dot form   pairs of bf16 through `vdpbf16ps` (avx512_bf16). Queries enter as `terms` bf16 terms (2: the value and
               what rounding left, error 2^-17), probabilities rounded to bf16 with the sum taken over the rounded ones.
    fma form   f32 multiply-add, keys widened to f32 a tile at a time (avx512, avx2)
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from hmc.codegen.ir import BF16, F32, I8, I16, I32, I64, Emitter, Value, const, fconst, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import (
    dot_pairs,
    exp,
    fmax,
    for_strips,
    fsplat,
    isplat,
    lanes_mask,
    load_part,
    resize,
    store_f32,
)
from hmc.errors import KernelError

PARTITION = 256
"""Positions of one task."""

_NEVER = float("-inf")
_L2, _L1 = 2, 3
"""Prefetch hints: what is needed a phase from now, and what is needed next."""


@dataclass(frozen=True)
class Shape:
    """Sizes of one attention kernel.

    `heads` query heads share `kv_heads` cache rows of `key` elements (the value: the first `value` elements of the
    value row). A head group is `members` heads in `width` lanes; a cache row holds `key_row` and `value_row` elements.
    """

    isa: str
    heads: int
    kv_heads: int
    key: int
    value: int
    key_row: int
    value_row: int
    block: int
    window: int
    terms: int

    def __post_init__(self) -> None:
        if self.heads % self.kv_heads:
            raise KernelError(f"attention: {self.heads} heads over {self.kv_heads} key heads")
        if self.block % 2 or self.key % 2:
            raise KernelError("attention: block and key width must be even")

    @property
    def lanes(self) -> int:
        """f32 lanes of a vector."""
        return TIERS[self.isa].lanes

    @property
    def dot(self) -> bool:
        """Whether pairs of bf16 are multiplied."""
        return self.isa == "avx512_bf16"

    @property
    def step(self) -> int:
        """Elements (of a key, or positions of a value) that one multiply takes."""
        return 2 if self.dot else 1

    @property
    def members(self) -> int:
        """Heads of a group: the most that divide the heads of one cache row and fit a vector."""
        per = self.heads // self.kv_heads
        return max(count for count in range(1, self.lanes + 1) if per % count == 0)

    @property
    def width(self) -> int:
        """Lanes that a group's heads take: 4, 8 or 16."""
        return max(4, 1 << (self.members - 1).bit_length())

    @property
    def groups(self) -> int:
        """Head groups of a token."""
        return self.heads // self.members

    @property
    def run(self) -> int:
        """Positions that are sure to lie in one block, at a constant distance."""
        return gcd(self.block, PARTITION)

    @property
    def tile(self) -> int:
        """Positions scored at once: as many as there are registers for."""
        most = 16 if self.lanes == 16 else 8
        return max(count for count in range(2, most + 1, 2) if self.run % count == 0)

    @property
    def record_bytes(self) -> int:
        """A record: result f32 [members, value], then maximum and sum f32 [width] each."""
        return (self.members * self.value + 2 * self.width) * 4 + 63 & ~63

    def scratch_bytes(self, tokens: int, max_context: int) -> int:
        """Bytes of scratch for `tokens` tokens of up to `max_context` positions each."""
        return tokens * (-(-max_context // PARTITION) + 1) * self.groups * self.record_bytes


class Walk:
    """Loops over (token, partition, group) that count records and positions, the same in every worker."""

    def __init__(self, e: Emitter, shape: Shape) -> None:
        self.e, self.shape = e, shape

    def limits(self, token: Value) -> tuple[Value, Value]:
        """First position and end of what `token` attends to; equal for a token at a negative position."""
        b = self.e.b
        end = b.add(b.sext(self.e.load(self.e.arg["positions"], token, I32), I64), const(1))
        end = b.select(b.icmp_signed("<", end, const(0)), const(0), end)
        if not self.shape.window:
            return const(0), end
        first = b.sub(end, const(self.shape.window))
        return b.select(b.icmp_signed("<", first, const(0)), const(0), first), end

    def partitions(self, token: Value) -> tuple[Value, Value]:
        """First partition of `token` and the one after its last."""
        b = self.e.b
        first, end = self.limits(token)
        return (
            b.udiv(first, const(PARTITION)),
            b.udiv(b.add(end, const(PARTITION - 1)), const(PARTITION)),
        )

    def records(self, token: Value) -> Value:
        """Records of `token`."""
        first, stop = self.partitions(token)
        return self.e.b.mul(self.e.b.sub(stop, first), const(self.shape.groups))

    def record(self, number: Value) -> Value:
        """Address of a record."""
        return self.e.offset(
            self.e.arg["scratch"], self.e.b.mul(number, const(self.shape.record_bytes))
        )

    def tasks(self, body: Callable[[Value, Value, Value, Value, Value], None]) -> None:
        """Emit `body(token, partition, group, record, more)` for this worker's tasks.

        A task belongs to the worker in whose share of all positions its middle falls. `more` (i1) guesses that the
        token's next task is this worker's too: good enough to fetch ahead by.
        """
        e, b, groups = self.e, self.e.b, const(self.shape.groups)
        total = e.local(I64, const(0))
        with e.for_range(0, e.arg["tokens"]) as token:
            first, end = self.limits(token)
            b.store(b.add(b.load(total), b.mul(b.sub(end, first), groups)), total)
        doubled = b.shl(b.load(total), const(1))
        low = b.mul(doubled, e.worker)
        high = b.add(low, doubled)
        seen, number = e.local(I64, const(0)), e.local(I64, const(0))
        with e.for_range(0, e.arg["tokens"]) as token:
            first, end = self.limits(token)
            one, stop = self.partitions(token)
            with e.for_range(one, stop) as partition:
                start = b.mul(partition, const(PARTITION))
                last = e.minimum(b.add(start, const(PARTITION)), end)
                start = b.select(b.icmp_signed("<", start, first), first, start)
                count = b.sub(last, start)
                with e.for_range(0, groups) as group:
                    before = b.load(seen)
                    middle = b.mul(b.add(b.shl(before, const(1)), count), e.workers)
                    mine = b.and_(
                        b.icmp_signed("<=", low, middle), b.icmp_signed("<", middle, high)
                    )
                    with b.if_then(mine):
                        next_middle = b.mul(
                            b.add(b.shl(before, const(1)), b.mul(count, const(3))), e.workers
                        )
                        more = b.icmp_signed("<", next_middle, high)
                        body(token, partition, group, b.load(number), more)
                    b.store(b.add(before, count), seen)
                    b.store(b.add(b.load(number), const(1)), number)


@dataclass(frozen=True)
class Source:
    """Where a task finds its operands.

    A query is the concatenation of `segments`: (address of the f32 part of (token, head), its even number of elements).
    `values_apart` says that values are rows of their own, not the beginning of the key rows.
    """

    segments: tuple[tuple[Callable[[Value, Value], Value], int], ...]
    keys: Value
    values: Value
    values_apart: bool


class Task:
    """One task's code; buffers live on the worker's stack."""

    def __init__(self, e: Emitter, shape: Shape, source: Source) -> None:
        self.e, self.shape, self.source = e, shape, source
        s = shape
        steps = s.key // s.step + s.lanes
        word = I32 if s.dot else F32
        self.queries = [self._buffer(word, steps * s.width) for _ in range(s.terms if s.dot else 1)]
        self.scores = self._buffer(F32, (PARTITION + s.tile) * s.width)
        self.weights = self._buffer(word, (PARTITION + s.tile) * s.width)
        self.rows = self._buffer(I64, PARTITION // s.run + 1)
        self.next_rows = self._buffer(I64, PARTITION // s.run + 1)
        self.wide = None if s.dot else self._buffer(F32, s.tile * s.key)

    def _buffer(self, element: Value, count: int) -> Value:
        slot = self.e.local(element, count=count)
        slot.align = 64
        return slot

    def emit(
        self,
        token: Value,
        partition: Value,
        group: Value,
        record: Value,
        more: Value,
        walk: Walk,
    ) -> None:
        """The task's code at the builder's position."""
        e, b, s = self.e, self.e.b, self.shape
        first, end = walk.limits(token)
        start = b.mul(partition, const(PARTITION))
        count = e.minimum(b.sub(end, start), const(PARTITION))
        skip = b.sub(first, start)
        skip = b.select(b.icmp_signed("<", skip, const(0)), const(0), skip)
        head = b.mul(group, const(s.members))
        sharing = const(s.groups // s.kv_heads)
        kv_head = b.udiv(group, sharing)
        self._find_rows(self.rows, token, start, count, kv_head)
        if self.source.values_apart:
            # The keys of the next task are fetched while this one's values are read: (partition, group + 1), or the
            # first group of the next partition; this task's own where there is none.
            after = b.add(group, const(1))
            wraps = b.icmp_signed("==", after, const(s.groups))
            next_start = b.select(wraps, b.add(start, const(PARTITION)), start)
            next_head = b.select(wraps, const(0), b.udiv(after, sharing))
            exists = b.and_(more, b.icmp_signed("<", next_start, end))
            next_start = b.select(exists, next_start, start)
            next_head = b.select(exists, next_head, kv_head)
            next_count = e.minimum(b.sub(end, next_start), const(PARTITION))
            self._find_rows(self.next_rows, token, next_start, next_count, next_head)
        self._pack_queries(token, head)
        maximum = self._score(skip, count)
        total = self._exponentials(skip, count, maximum)
        self._accumulate(skip, count, record)
        tail = const(s.members * s.value)
        e.store(maximum, record, tail)
        e.store(total, record, b.add(tail, const(s.width)))

    # -- where the rows are ------------------------------------------------------------------------

    def _find_rows(
        self, rows: Value, token: Value, start: Value, count: Value, kv_head: Value
    ) -> None:
        """rows[i] = number of the cache row of position start + i * run, counted over blocks, heads and slots."""
        e, b, s = self.e, self.e.b, self.shape
        sequence = b.sext(e.load(e.arg["sequence"], token, I32), I64)
        table = e.at(e.arg["tables"], b.mul(sequence, e.arg["table_stride"]), I32)
        runs = b.udiv(b.add(count, const(s.run - 1)), const(s.run))
        with e.for_range(0, runs) as index:
            position = b.add(start, b.mul(index, const(s.run)))
            number = b.sext(e.load(table, b.udiv(position, const(s.block)), I32), I64)
            row = b.add(b.mul(number, const(s.kv_heads)), kv_head)
            row = b.add(b.mul(row, const(s.block)), b.urem(position, const(s.block)))
            e.store(row, rows, index)
        # What lies behind is never read, only fetched ahead.
        with e.for_range(runs, PARTITION // s.run + 1) as index:
            e.store(e.load(rows, const(0), I64), rows, index)

    def _row(self, base: Value, elements: int, position: Value) -> Value:
        """Address of the row of the partition's `position`, a multiple of 2."""
        e, b, s = self.e, self.e.b, self.shape
        row = e.load(self.rows, b.udiv(position, const(s.run)), I64)
        row = b.add(row, b.urem(position, const(s.run)))
        return e.offset(base, b.mul(row, const(2 * elements)))

    # -- queries -----------------------------------------------------------------------------------

    def _pack_queries(self, token: Value, head: Value) -> None:
        """queries[term][key step][head lane], zero in lanes without a head."""
        e, b, s = self.e, self.e.b, self.shape
        size = s.step * s.lanes
        begin = 0
        for address, width in self.source.segments:
            rows = [address(token, b.add(head, const(lane))) for lane in range(s.members)]
            whole = width // size * size
            if whole:
                with e.for_range(0, whole, size) as start:
                    self._pack_square(rows, start, size, b.add(start, const(begin)))
            if whole < width:
                # Its zeros behind the segment are overwritten by the next segment or lie past the key.
                self._pack_square(rows, const(whole), width - whole, const(begin + whole))
            begin += width

    def _pack_square(self, rows: list[Value], start: Value, count: int, into: Value) -> None:
        """Elements [start, start + count) of the query rows to key steps from element `into` on."""
        e, b, s = self.e, self.e.b, self.shape
        size = s.step * s.lanes
        blank = e.zeros(I32 if s.dot else F32, s.lanes)
        terms: list[list[Value]] = [[blank] * s.width for _ in self.queries]
        for lane, row in enumerate(rows):
            value = load_part(e, row, start, F32, count, size)
            for term in terms:
                if s.dot:
                    bits = self._round(value)
                    term[lane] = b.bitcast(bits, vec(I32, s.lanes))
                    value = b.fsub(value, e.bf16_to_f32(bits))
                else:
                    term[lane] = value
        at = b.mul(b.udiv(into, const(s.step)), const(s.width))
        for query, term in zip(self.queries, terms, strict=True):
            for index, column in enumerate(_shuffle(e, term)):
                e.store(column, query, b.add(at, const(index * s.lanes)))

    def _round(self, value: Value) -> Value:
        """f32 to bf16 bits by the instruction of the dot form's tier."""
        count = value.type.count
        return self.e.b.bitcast(self.e.b.fptrunc(value, vec(BF16, count)), vec(I16, count))

    # -- scores ------------------------------------------------------------------------------------

    def _score(self, skip: Value, count: Value) -> Value:
        """scores[position][lane] = scale * (query . key), -inf where not attended; returns the maxima."""
        e, b, s = self.e, self.e.b, self.shape
        kind = vec(F32, s.width)
        never = fsplat(_NEVER, s.width)
        scale = e.splat(e.arg["scale"], s.width)
        maximum = e.local(kind, never)
        start = b.mul(b.udiv(skip, const(s.tile)), const(s.tile))
        steps = s.key // s.step
        row_bytes = 2 * s.key_row
        with e.for_range(start, count, s.tile) as position:
            keys = self._row(self.source.keys, s.key_row, position)
            after = self._row(self.source.keys, s.key_row, b.add(position, const(s.tile)))
            ahead = [(after, s.tile * row_bytes, _L1)]
            if self.source.values_apart:
                values = self._row(self.source.values, s.value_row, position)
                ahead.append((values, s.tile * 2 * s.value_row, _L2))
            if self.wide is not None:
                self._widen(keys)
            sums = [e.local(kind, e.zeros(F32, s.width)) for _ in range(s.tile)]
            with e.for_range(0, steps) as step:
                for base, size, level in ahead:
                    self._prefetch_slice(base, size, level, step, steps)
                query = [
                    e.load_vec(
                        q,
                        b.mul(step, const(s.width)),
                        I32 if s.dot else F32,
                        s.width,
                        align=4 * s.width,
                    )
                    for q in self.queries
                ]
                for row in range(s.tile):
                    total = b.load(sums[row])
                    if s.dot:
                        at = b.add(step, const(row * s.key_row // 2))
                        pair = e.splat(e.load(keys, at, I32, align=4), s.width)
                        for q in query:
                            total = dot_pairs(e, total, q, pair)
                    else:
                        at = b.add(step, const(row * s.key))
                        one = e.splat(e.load(self.wide, at, F32, align=4), s.width)
                        total = e.fma(query[0], one, total)
                    b.store(total, sums[row])
            for row in range(s.tile):
                where = b.add(position, const(row))
                valid = b.and_(b.icmp_signed("<", where, count), b.icmp_signed(">=", where, skip))
                score = b.select(valid, b.fmul(b.load(sums[row]), scale), never)
                e.store(score, self.scores, b.mul(where, const(s.width)), align=4 * s.width)
                b.store(fmax(e, score, b.load(maximum)), maximum)
        return b.load(maximum)

    def _prefetch_slice(self, base: Value, size: int, level: int, step: Value, steps: int) -> None:
        """Fetch the part of [base, base + size) that falls to `step` of `steps`: traffic spread evenly."""
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
            source = e.offset(keys, const(2 * row * s.key_row))
            target = e.at(self.wide, const(row * s.key), F32)

            def strip(
                index: Value, size: int, way: int, source: Value = source, target: Value = target
            ) -> None:
                value = e.bf16_to_f32(load_part(e, source, index, I16, size, s.lanes))
                store_f32(e, "f32", value, target, index, size)

            for_strips(e, s.key, s.lanes, strip, 4)

    # -- softmax -----------------------------------------------------------------------------------

    def _exponentials(self, skip: Value, count: Value, maximum: Value) -> Value:
        """weights[position (pair)][lane] = e**(score - maximum), as bf16 pairs or f32; returns the sums."""
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
                bits = self._round(weight)
                weight = e.bf16_to_f32(bits)
                low, high = (
                    b.zext(b.shuffle_vector(bits, bits, half), vec(I32, s.width)) for half in halves
                )
                pairs = b.or_(low, b.shl(high, isplat(16, s.width)))
                e.store(pairs, self.weights, b.udiv(at, const(2)), align=4 * s.width)
            else:
                e.store(weight, self.weights, at, align=8 * s.width)
            b.store(b.fadd(b.load(total), weight), total)
        sums = b.load(total)
        return b.fadd(*(b.shuffle_vector(sums, sums, half) for half in halves))

    # -- results -----------------------------------------------------------------------------------

    def _accumulate(self, skip: Value, count: Value, record: Value) -> None:
        """record[member][:] = sum over positions of weight * value, tile by tile of heads x dimensions."""
        s = self.shape
        budget = 16 if s.lanes == 16 else 8
        tall = min(s.members, budget // 2)
        strips = min(max(budget // tall, 2), 4) & ~1
        span = strips * s.lanes
        whole = s.value // span * span
        heads = s.members // tall * tall
        e = self.e
        if whole:
            with e.for_range(0, whole, span) as column:
                with e.for_range(0, heads, tall) as head:
                    self._result_tile(skip, count, record, head, tall, column, span)
                if heads < s.members:
                    self._result_tile(
                        skip, count, record, const(heads), s.members - heads, column, span
                    )
        if whole < s.value:
            rest = s.value - whole
            for head in range(0, s.members, tall):
                self._result_tile(
                    skip,
                    count,
                    record,
                    const(head),
                    min(tall, s.members - head),
                    const(whole),
                    rest,
                )

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
        """`tall` heads from `head` on, `span` dimensions from `column` on, summed over all positions in registers."""
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
                one = e.splat(e.load(self.weights, index, I32 if s.dot else F32, align=4), s.lanes)
                for slot, value in zip(sums[h], loaded, strict=True):
                    old = b.load(slot)
                    b.store(
                        dot_pairs(e, old, one, value) if s.dot else e.fma(one, value, old), slot
                    )

        start = b.mul(b.udiv(skip, const(s.run)), const(s.run))
        with e.for_range(start, count, s.run) as run:
            base = self._row(self.source.values, s.value_row, run)
            stop = e.minimum(b.sub(count, run), const(s.run))
            begin = b.sub(b.and_(skip, const(-2)), run)
            begin = b.select(b.icmp_signed("<", begin, const(0)), const(0), begin)
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
            for offsets, size in columns:
                parts = [b.load(slot) for slot in sums[h][vector : vector + len(offsets)]]
                vector += len(offsets)
                if len(parts) == 2:
                    parts = [b.shuffle_vector(*parts, mask) for mask in _zip_masks(s.lanes)]
                for part, offset in zip(parts, offsets, strict=True):
                    used = min(s.lanes, span - offset)
                    e.store(resize(e, part, used), target, b.add(column, const(offset)))

    def _next_keys(self, run: Value) -> Value | None:
        """Address of the next task's keys at the partition's position `run`."""
        if not self.source.values_apart:
            return None
        row = self.e.load(self.next_rows, self.e.b.udiv(run, const(self.shape.run)), I64)
        size = const(2 * self.shape.key_row)
        return self.e.offset(self.source.keys, self.e.b.mul(row, size))

    def _fetch_keys(self, keys: Value, within: Value, column: Value, span: int) -> None:
        """Fetch the share of `step` next key rows that belongs to `span` of the value's dimensions."""
        e, b, s = self.e, self.e.b, self.shape
        row_bytes = 2 * s.key_row * s.step
        share = b.udiv(b.mul(column, const(row_bytes)), const(s.value))
        start = e.offset(keys, b.add(b.mul(within, const(2 * s.key_row)), share))
        for line in range(-(-row_bytes * span // (64 * s.value))):
            e.prefetch(e.offset(start, const(64 * line)), _L2)

    def _load_values(
        self, values: Value, columns: list[tuple[list[int], int]], column: Value, rows: int
    ) -> list[Value]:
        """The operand vectors of one position (fma form) or pair of positions (dot form; `rows` 1: the second is 0)."""
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
                for mask in _unpack_masks(lanes):
                    mixed = b.shuffle_vector(first, second, mask)
                    found.append(b.bitcast(mixed, vec(I32, s.lanes)))
            else:
                wide = [b.zext(half, vec(I32, s.lanes)) for half in (first, second)]
                shift = b.shl(wide[1], isplat(16, s.lanes))
                found.append(b.or_(wide[0], shift))
        return found


def _columns(span: int, lanes: int, *, paired: bool) -> list[tuple[list[int], int]]:
    """Cut `span` dimensions into operand loads: (offsets of the vectors made of it, elements loaded)."""
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


def _unpack_masks(count: int) -> list[Value]:
    """`vpunpcklwd` and `vpunpckhwd` of two vectors of `count` words: pairs, in 128-bit groups."""
    return [
        lanes_mask(
            [
                group * 8 + half * 4 + item // 2 + item % 2 * count
                for group in range(count // 8)
                for item in range(8)
            ]
        )
        for half in range(2)
    ]


def _zip_masks(lanes: int) -> list[Value]:
    """Undo `_unpack_masks` on the two sums: group g of the result is half g % 2 of 128-bit group g // 2."""
    order = [
        (group // 2) * 4 + item + group % 2 * lanes
        for group in range(2 * lanes // 4)
        for item in range(4)
    ]
    return [lanes_mask(order[:lanes]), lanes_mask(order[lanes:])]


def _shuffle(e: Emitter, rows: list[Value]) -> list[Value]:
    """Rows [width][lanes] to the same elements in the order [lanes][width], as `width` vectors: perfect shuffles."""
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


def emit_join(spec: KernelSpec, shape: Shape, y: str, stride: Callable[[Emitter], Value]) -> str:
    """y[token, head, :] bf16 = merged records, divided by the sum; split by (token, head). Zeros for no positions."""
    e = Emitter(spec)
    b, s = e.b, shape
    walk = Walk(e, shape)
    lanes = s.lanes
    number, reached = e.local(I64, const(0)), e.local(I64, const(0))
    start, stop = e.split(b.mul(e.arg["tokens"], const(s.heads)))
    with e.for_range(start, stop) as item:
        token, head = b.udiv(item, const(s.heads)), b.urem(item, const(s.heads))
        with e.for_range(b.load(reached), token) as passed:
            b.store(b.add(b.load(number), walk.records(passed)), number)
        b.store(token, reached)
        group, member = b.udiv(head, const(s.members)), b.urem(head, const(s.members))
        one, after = walk.partitions(token)
        count = b.sub(after, one)
        first = walk.record(b.add(b.load(number), group))
        apart = const(s.groups * s.record_bytes)
        tail = b.add(const(s.members * s.value), member)

        def field(index: Value, at: Value, first: Value = first) -> Value:
            return e.load(e.offset(first, b.mul(index, apart)), at, F32)

        maximum = e.local(F32, fconst(_NEVER))
        with e.for_range(0, count) as index:
            value, old = field(index, tail), b.load(maximum)
            b.store(b.select(b.fcmp_ordered(">", value, old), value, old), maximum)
        top = b.load(maximum)

        def share(index: Value, top: Value = top, tail: Value = tail) -> Value:
            return exp(e, e.splat(b.fsub(field(index, tail), top), lanes))

        total = e.local(F32, fconst(0.0))
        with e.for_range(0, count) as index:
            weight = b.extract_element(share(index), I32(0))
            part = field(index, b.add(tail, const(s.width)))
            b.store(e.fma(weight, part, b.load(total)), total)
        divisor = b.load(total)
        divisor = b.select(b.icmp_signed("==", count, const(0)), fconst(1.0), divisor)
        target_index = b.add(b.mul(token, stride(e)), b.mul(head, const(s.value)))
        target = e.at(e.arg[y], target_index, I16)
        source = e.at(first, b.mul(member, const(s.value)), F32)

        def columns(
            base: Value,
            size: int,
            source: Value = source,
            target: Value = target,
            divisor: Value = divisor,
            count: Value = count,
        ) -> None:
            cut = range(0, size, lanes)
            sums = [e.local(vec(F32, lanes), e.zeros(F32, lanes)) for _ in cut]
            with e.for_range(0, count) as index:
                weight = share(index)
                row = e.offset(b.bitcast(source, I8.as_pointer()), b.mul(index, apart))
                for slot, at in zip(sums, cut, strict=True):
                    used = min(lanes, size - at)
                    value = load_part(e, row, b.add(base, const(at)), F32, used, lanes)
                    b.store(e.fma(weight, value, b.load(slot)), slot)
            for slot, at in zip(sums, cut, strict=True):
                value = b.fdiv(b.load(slot), e.splat(divisor, lanes))
                used = min(lanes, size - at)
                store_f32(e, "bf16", value, target, b.add(base, const(at)), used)

        span = 8 * lanes
        whole = s.value // span * span
        if whole:
            with e.for_range(0, whole, span) as base:
                columns(base, span)
        if whole < s.value:
            columns(const(whole), s.value - whole)
    return e.finish()
