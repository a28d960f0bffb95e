"""Decode attention, grouped-query and latent alike: the context's partitions, their tasks, and the
merge of the records.

The context, or what a token chose of it, is cut into partitions of `PARTITION` positions, the same
for every token, batch and number of workers. A task is (token, partition, head group): its heads
all read the same cache rows, once for keys and once, out of the cache, for values. Memory is kept
busy throughout: values are fetched while keys are read, the next task's keys while values are read.
A task writes a record: maximum, sum and unnormalised result. `emit_join` merges a token's records
in ascending order (the log-sum-exp merge of split softmax). So results depend on nothing but the
token.
"""

from __future__ import annotations

from collections.abc import Callable

from hmc.codegen.ir import F32, I8, I16, I32, I64, Emitter, Value, const, fconst, vec
from hmc.codegen.kernels.attention.attend_rows import NEVER, PARTITION, Rows, Shape, Source
from hmc.codegen.kernels.attention.attend_scores import Scores
from hmc.codegen.kernels.attention.attend_values import Results
from hmc.codegen.kernels.attention.options import first_seen, most_read, reach, read_count
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import exp, for_blocks, load_part, store_f32


def attention_scratch_bytes(spec: KernelSpec, tokens: int, max_context: int) -> int:
    """Bytes of `scratch` of decode attention and its join, for `tokens` of at most `max_context`
    positions.
    """
    shape, longest = Shape.of(spec), min(max_context, most_read(spec) or max_context)
    return tokens * (-(-longest // PARTITION) + 1) * shape.groups * shape.record_bytes


class Walk:
    """Loops over (token, partition, group) that count records and positions, the same in every
    worker.
    """

    def __init__(self, e: Emitter, shape: Shape) -> None:
        self.e, self.shape = e, shape

    def limits(self, token: Value) -> tuple[Value, Value]:
        """First position and end of what `token` attends to, of blocks that it chose as if they
        followed each other; equal for a token at a negative position.
        """
        e, b = self.e, self.e.b
        position = e.load_int(e.arg["positions"], token)
        own = e.positive(position)
        end = b.select(b.icmp_signed("<", position, const(0)), const(0), read_count(e, own))
        return first_seen(e, own) if reach(e.spec) else const(0), end

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

        A task belongs to the worker in whose share of all positions its middle falls. `more` (i1)
        guesses that the token's next task is this worker's too: good enough to fetch ahead by.
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


def emit_records(e: Emitter, source: Source) -> None:
    """The whole kernel: records of every (token, partition, head group). Buffers live on the
    worker's stack.
    """
    b, s = e.b, Shape.of(e.spec)
    rows = Rows(e, s)
    next_rows = Rows(e, s) if source.values_apart else None
    scores = Scores(e, s, source, rows)
    results = Results(e, s, source, scores.weights, rows, next_rows)
    walk = Walk(e, s)

    def task(token: Value, partition: Value, group: Value, number: Value, more: Value) -> None:
        record = walk.record(number)
        first, end = walk.limits(token)
        start = b.mul(partition, const(PARTITION))
        count = e.minimum(b.sub(end, start), const(PARTITION))
        skip = e.positive(b.sub(first, start))
        head = b.mul(group, const(s.members))
        sharing = const(s.groups // s.kv_heads)
        kv_head = b.udiv(group, sharing)
        rows.find(token, start, count, kv_head)
        if next_rows is not None:
            # The keys of the next task are fetched while this one's values are read: (partition,
            # group + 1), or the first group of the next partition; this task's own where there is
            # none.
            after = b.add(group, const(1))
            wraps = b.icmp_signed("==", after, const(s.groups))
            next_start = b.select(wraps, b.add(start, const(PARTITION)), start)
            next_head = b.select(wraps, const(0), b.udiv(after, sharing))
            exists = b.and_(more, b.icmp_signed("<", next_start, end))
            next_start = b.select(exists, next_start, start)
            next_head = b.select(exists, next_head, kv_head)
            next_count = e.minimum(b.sub(end, next_start), const(PARTITION))
            next_rows.find(token, next_start, next_count, next_head)
        maximum, total = scores.emit(token, head, skip, count)
        results.emit(skip, count, record)
        tail = const(s.members * s.value)
        e.store(maximum, record, tail)
        e.store(total, record, b.add(tail, const(s.width)))

    walk.tasks(task)


def emit_join(e: Emitter, y: Value, stride: Value) -> None:
    """y[token, head, :] bf16 = merged records, divided by the sum; split by (token, head). Zeros
    for no positions.
    """
    b, s = e.b, Shape.of(e.spec)
    walk = Walk(e, s)
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

        def field(index: Value, at: Value) -> Value:
            return e.load(e.offset(first, b.mul(index, apart)), at, F32)

        maximum = e.local(F32, fconst(NEVER))
        with e.for_range(0, count) as index:
            value, old = field(index, tail), b.load(maximum)
            b.store(b.select(b.fcmp_ordered(">", value, old), value, old), maximum)
        sink = e.load(e.arg["sinks"], head, F32) if e.spec.get("sinks") else None
        if sink is not None:
            old = b.load(maximum)
            b.store(b.select(b.fcmp_ordered(">", sink, old), sink, old), maximum)
        top = b.load(maximum)

        def share(index: Value) -> Value:
            return exp(e, e.splat(b.fsub(field(index, tail), top), lanes))

        total = e.local(F32, fconst(0.0))
        with e.for_range(0, count) as index:
            weight = b.extract_element(share(index), I32(0))
            part = field(index, b.add(tail, const(s.width)))
            b.store(e.fma(weight, part, b.load(total)), total)
        divisor = b.load(total)
        if sink is not None:
            rest = exp(e, e.splat(b.fsub(sink, top), lanes))
            divisor = b.fadd(divisor, b.extract_element(rest, I32(0)))
        divisor = b.select(b.icmp_signed("==", count, const(0)), fconst(1.0), divisor)
        target_index = b.add(b.mul(token, stride), b.mul(head, const(s.value)))
        target = e.at(y, target_index, I16)
        source = e.at(first, b.mul(member, const(s.value)), F32)

        def columns(base: Value, size: int) -> None:
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

        for_blocks(e, s.value, 8 * lanes, columns)
