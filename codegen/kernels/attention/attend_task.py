"""Attention tasks: the heads of a group against one partition of a token's context.

Cache rows are read once for keys and once, out of the cache, for values. Memory is kept busy
throughout: values are fetched while keys are read, the next task's keys while values are read.
"""

from __future__ import annotations

from hmc.codegen.ir import Emitter, Value, const
from hmc.codegen.kernels.attention.attend import PARTITION, Shape, Walk
from hmc.codegen.kernels.attention.attend_rows import Rows, Source
from hmc.codegen.kernels.attention.attend_scores import Scores
from hmc.codegen.kernels.attention.attend_values import Results


def emit_records(e: Emitter, source: Source) -> str:
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
    return e.finish()
