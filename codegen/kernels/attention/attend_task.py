"""One attention task: the heads of a group against one partition of a token's context.

Cache rows are read once for keys and once, out of the cache, for values. Memory is kept busy
throughout: values are fetched while keys are read, the next task's keys while values are read.
"""

from __future__ import annotations

from hmc.codegen.ir import Emitter, Value, const
from hmc.codegen.kernels.attention.attend import PARTITION, Shape, Walk
from hmc.codegen.kernels.attention.attend_rows import Rows, Source
from hmc.codegen.kernels.attention.attend_scores import Scores
from hmc.codegen.kernels.attention.attend_values import Results


class Task:
    """One task's code; buffers live on the worker's stack."""

    def __init__(self, e: Emitter, shape: Shape, source: Source) -> None:
        self.e, self.shape = e, shape
        self.rows = Rows(e, shape)
        self.next_rows = Rows(e, shape) if source.values_apart else None
        self.scores = Scores(e, shape, source, self.rows)
        weights = self.scores.weights
        self.results = Results(e, shape, source, weights, self.rows, self.next_rows)

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
        self.rows.find(token, start, count, kv_head)
        if self.next_rows is not None:
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
            self.next_rows.find(token, next_start, next_count, next_head)
        maximum, total = self.scores.emit(token, head, skip, count)
        self.results.emit(skip, count, record)
        tail = const(s.members * s.value)
        e.store(maximum, record, tail)
        e.store(total, record, b.add(tail, const(s.width)))
