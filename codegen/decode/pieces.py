"""A worker's share of a record, whole or in pieces that the workers even out among themselves.

A record in pieces keeps most of them for the worker in whose share they lie, which does these in
one call, front to back; the last pieces of every share are drawn by whoever is free. So workers
finish at the same time although memory does not serve them alike, and a share stays one stream.
Workers of a NUMA node are a team: they draw the pieces of their own team first, which lie in their
memory, and then those of the others. What a kernel computes of a row does not depend on who
computes it, so results do not either.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.ir import I64, Emitter, Value, const

TICKET = 8
"""Words from a team's ticket, 0 at first, to the one of the team before it; that of the first team
lies so many before the record's argument block. Each is on a line of its own."""

_COUNT, _KEPT, _MASK = 8, 24, 0xFFFF


def flags(count: int, kept: int) -> int:
    """Flags of a record: each worker's share is cut in `count` pieces, of which it keeps `kept` for
    itself; 0, 0: it is whole. `ValueError` for numbers that make no sense.
    """
    if not 0 <= kept <= count <= _MASK:
        raise ValueError(f"a share of {count} pieces, {kept} of them kept")
    return count << _COUNT | kept << _KEPT


@dataclass(frozen=True)
class Teams:
    """How many there are, where each one's workers begin (i64* [count + 1]), and which the worker's
    `own` is."""

    count: Value
    bounds: Value
    own: Value

    @staticmethod
    def read(e: Emitter, count: Value, bounds: Value) -> Teams:
        """The worker's own is the last that begins with it or before it."""
        b, own = e.b, e.local(I64, const(0))
        with e.for_range(const(1), count) as team:
            begun = b.icmp_signed("<=", b.load(b.gep(bounds, [team])), e.worker)
            b.store(b.select(begun, team, b.load(own)), own)
        return Teams(count, bounds, b.load(own))


def share(e: Emitter, kernel: Value, block: Value, word: Value, teams: Teams) -> None:
    """Call the kernel for this worker's share of the record whose flags are `word`."""
    b = e.b
    args = b.inttoptr(block, I64.as_pointer())
    pieces, kept = (b.and_(b.lshr(word, const(shift)), const(_MASK)) for shift in (_COUNT, _KEPT))
    whole = b.icmp_unsigned("==", pieces, const(0))
    with b.if_else(whole, likely=True) as (alone, cut):
        with alone:
            b.call(kernel, [args, e.worker, e.workers, const(1)])
        with cut:
            of = b.mul(pieces, e.workers)
            b.call(kernel, [args, b.mul(pieces, e.worker), of, kept])
            _tickets(e, kernel, args, pieces, kept, of, teams)


def _tickets(
    e: Emitter, kernel: Value, args: Value, pieces: Value, kept: Value, of: Value, teams: Teams
) -> None:
    """Draw pieces that no worker has kept, one by one, until there are none: of the worker's own
    team first.

    Every worker draws in vain once of each team, so the last of all draws is known by its number:
    it resets the tickets for the program's next run.
    """
    b = e.b
    with e.for_range(const(0), teams.count) as turn:
        after = b.add(teams.own, turn)
        around = b.sub(after, teams.count)
        team = b.select(b.icmp_signed("<", after, teams.count), after, around)
        ticket = b.gep(args, [b.mul(b.add(team, const(1)), const(-TICKET))])
        start = b.load(b.gep(teams.bounds, [team]))
        members = b.sub(b.load(b.gep(teams.bounds, [b.add(team, const(1))])), start)
        free = b.mul(b.sub(pieces, kept), members)
        last = b.sub(b.add(free, e.workers), const(1))
        with e.forever() as done:
            drawn = b.atomic_rmw("add", ticket, const(1), "monotonic")
            e.leave_if(b.icmp_unsigned(">=", drawn, free), done)
            # By turns from each worker's range, where the workers are just then.
            owner, place = b.add(start, b.urem(drawn, members)), b.udiv(drawn, members)
            first = b.add(b.add(b.mul(pieces, owner), kept), place)
            b.call(kernel, [args, first, of, const(1)])
        with b.if_then(b.icmp_unsigned("==", drawn, last), likely=False):
            b.store_atomic(const(0), ticket, "monotonic", 8)
