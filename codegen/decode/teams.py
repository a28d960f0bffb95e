"""Which items of a whole are those of a team: of the workers of one NUMA node.

Where every matrix is split by its rows over all workers, as `Emitter.split` does it, the rows of a
team's workers are neighbours, the same ones of every matrix of so many rows: they lie in the memory
of its node (runtime/weights/placing.py). Kernels that split several matrices laid end to end must
keep to them, and split those of its team among its workers.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.ir import I64, Emitter, Value, const


@dataclass(frozen=True)
class Own:
    """Items [first, last) of each whole are the team's, in which this call does the shares of
    workers `worker` to `worker + span` of `workers`."""

    e: Emitter
    first: Value
    last: Value
    worker: Value
    workers: Value

    @staticmethod
    def of(e: Emitter, table: Value, total: Value) -> Own:
        """Of wholes of `total` items (i64). `table` (i8*) is i64 [1 + teams + 1]: how many teams,
        where the workers of each begin, and how many workers there are; 0: one team.
        """
        b = e.b
        slots = [e.local(I64) for _ in range(4)]
        for slot, value in zip(slots, (const(0), total, e.worker, e.workers), strict=True):
            b.store(value, slot)
        with b.if_then(b.icmp_unsigned("!=", b.ptrtoint(table, I64), const(0))):
            teams = e.load(table, const(0), I64)
            everybody = e.load(table, b.add(teams, const(1)), I64)
            each = b.sdiv(e.workers, everybody)  # shares of a worker: pieces
            with e.for_range(0, teams) as team:
                begin, end = (e.load(table, b.add(team, const(at)), I64) for at in (1, 2))
                begun = b.icmp_signed("<=", b.mul(begin, each), e.worker)
                own = b.and_(begun, b.icmp_signed("<", e.worker, b.mul(end, each)))
                found = (
                    *(b.sdiv(b.mul(total, edge), everybody) for edge in (begin, end)),
                    b.sub(e.worker, b.mul(begin, each)),
                    b.mul(b.sub(end, begin), each),
                )
                with b.if_then(own):
                    for slot, value in zip(slots, found, strict=True):
                        b.store(value, slot)
        return Own(e, *(b.load(slot) for slot in slots))

    def split(self, wholes: Value) -> tuple[Value, Value]:
        """This call's share [begin, end) of the team's items of `wholes` laid end to end."""
        b = self.e.b
        total = b.mul(wholes, b.sub(self.last, self.first))
        begin = b.sdiv(b.mul(total, self.worker), self.workers)
        end = b.sdiv(b.mul(total, b.add(self.worker, self.e.span)), self.workers)
        return begin, end
