"""The loop a native worker lives in, and the caller's half of it; hides futexes, memory ordering
and the barrier.

A program is an array of records, int64 [n, 4]: kernel address, argument block address, flags, tag.
Every worker walks every record and does its share of each (codegen/decode/pieces.py). Workers and
caller meet in one control block of int64 words, whose layout are the constants below; words that
different threads write lie `LINE` words (two cache lines, since the adjacent-line prefetcher pairs
them) apart.

Ordering: the caller publishes by exchanging GENERATION (release), workers load it (acquire). A
worker's share is released by its decrement of PENDING; whoever takes the last one exchanges
FINISHED, which the caller acquires. The barrier does the same with its counts of arrived workers
and its phases. Whoever sleeps first adds itself to a count of sleepers and then lets the kernel
compare the word; whoever changes a word then passes a full fence (on x86 an exchange is one) and
looks at the count: one of the two always sees the other, so no wake-up is lost, and nobody makes a
system call while all are spinning.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from llvmlite import ir

from hmc.codegen.decode.pieces import Teams, share
from hmc.codegen.ir import I1, I32, I64, Emitter, Value, const
from hmc.codegen.jit import KERNEL_TYPE

RECORD_WORDS = 4
BARRIER = 1
"""Flag of a record: every earlier record is finished by all workers before it starts."""
GATE = 2
"""Flag of a record: when worker 0 is through and the first word of its arguments is not 0, the
program ends, for all workers at the next barrier."""

LINE = 16
# Written by the caller while the workers are idle (STOP: any time), read by all.
GENERATION, PROGRAM, LENGTH, TRACE, STOP, IDLE_SPIN, BARRIER_SPIN = range(7)
ENDS = 7
"""The program ends at the first barrier before this record or a later one: its length, or less
where worker 0 found a gate given up. A worker that is still leaving an earlier barrier stays."""
POLL_SECONDS, POLL_NANOSECONDS = 8, 9
"""A timespec: how long the caller, or a worker at a barrier, sleeps before it looks around."""
TEAMS, BOUNDS = 10, 11
"""How many NUMA nodes the workers are of, and the address of an i64 table of where each one's
workers begin, and how many there are in all."""
SLEEPERS = 1 * LINE
PENDING = 2 * LINE
FINISHED = 3 * LINE
CALLER_SLEEPS = 4 * LINE
ARRIVED = 5 * LINE
PHASE_SLEEPERS = 6 * LINE
FIRST_WORKER = 7 * LINE
"""Worker w's line starts at FIRST_WORKER + w * LINE; its first word is 1 + the record it is in, 0
when idle."""

WAIT, RUN, HALT = range(3)
"""What `pool_call` does (passed in place of the worker): wait, publish and wait, or end all
workers."""

_FUTEX, _FUTEX_WAIT_PRIVATE, _FUTEX_WAKE_PRIVATE = 202, 128, 129

GROUP = 8
"""Workers that meet at one counter of the barrier; a node's workers are neighbours, so most groups
stay within one."""

_GROUP_PHASE = LINE
_GROUP_WORDS = 2 * LINE
# Group g's lines, its count of arrived workers and its phase, follow those of the workers.


def control_words(workers: int) -> int:
    """Size of the control block of a pool, in int64 words."""
    return FIRST_WORKER + workers * LINE + -(-workers // GROUP) * _GROUP_WORDS


def emit_worker_loop(e: Emitter) -> None:
    """IR of `worker_loop(control, worker, workers)`: runs programs until STOP is set, then
    returns."""
    b = e.b
    seen = e.local(I64, const(0))
    phase = e.local(I64, const(0))
    mine = _word(e, b.add(const(FIRST_WORKER), b.mul(e.worker, const(LINE))))
    bounds = b.inttoptr(b.load(_word(e, BOUNDS)), I64.as_pointer())
    teams = Teams.read(e, b.load(_word(e, TEAMS)), bounds)
    next_program = b.append_basic_block("next_program")
    leave = b.append_basic_block("leave")
    b.branch(next_program)

    b.position_at_end(next_program)
    _wait(e, GENERATION, b.load(seen), IDLE_SPIN, SLEEPERS)
    generation = b.load_atomic(_word(e, GENERATION), "acquire", 8)
    b.store(generation, seen)
    walked = b.append_basic_block("walked")
    e.leave_if(_stopped(e), leave)
    records = b.inttoptr(b.load(_word(e, PROGRAM)), I64.as_pointer())
    length = b.load(_word(e, LENGTH))
    trace = b.load(_word(e, TRACE))
    traced = b.icmp_unsigned("!=", trace, const(0))
    stamps = b.inttoptr(trace, I64.as_pointer())
    with e.for_range(const(0), length) as index:
        record = b.gep(records, [b.mul(index, const(RECORD_WORDS))])
        address, block, flags = (b.load(b.gep(record, [const(i)])) for i in range(3))
        barrier = b.icmp_unsigned("!=", b.and_(flags, const(BARRIER)), const(0))
        with b.if_then(barrier):
            _barrier(e, phase, leave)
            ends = b.load_atomic(_word(e, ENDS), "acquire", 8)
            e.leave_if(b.icmp_signed("<=", ends, index), walked)
        b.store_atomic(b.add(index, const(1)), mine, "monotonic", 8)
        slot = b.mul(b.add(b.mul(index, e.workers), e.worker), const(2))
        with b.if_then(traced):
            b.store(_ticks(e), b.gep(stamps, [slot]))
        share(e, b.inttoptr(address, KERNEL_TYPE.as_pointer()), block, flags, teams)
        gate = b.icmp_unsigned("!=", b.and_(flags, const(GATE)), const(0))
        first = b.icmp_signed("==", e.worker, const(0))
        with b.if_then(b.and_(gate, first), likely=False):
            given_up = b.load(b.inttoptr(block, I64.as_pointer()))
            with b.if_then(b.icmp_unsigned("!=", given_up, const(0)), likely=False):
                b.store_atomic(b.add(index, const(1)), _word(e, ENDS), "release", 8)
        with b.if_then(traced):
            b.store(_ticks(e), b.gep(stamps, [b.add(slot, const(1))]))
    b.branch(walked)

    b.position_at_end(walked)
    b.store_atomic(const(0), mine, "monotonic", 8)
    left = b.atomic_rmw("sub", _word(e, PENDING), const(1), "acq_rel")
    with b.if_then(b.icmp_unsigned("==", left, const(1))):
        b.atomic_rmw("xchg", _word(e, FINISHED), generation, "seq_cst")
        with _if_any(e, CALLER_SLEEPS):
            _wake(e, FINISHED)
    b.branch(next_program)

    b.position_at_end(leave)


def emit_pool_call(e: Emitter) -> None:
    """IR of `pool_call(control, what, workers)`: `what` is WAIT, RUN or HALT.

    WAIT and RUN return when the program is finished (FINISHED equals GENERATION), after one poll
    interval, or when a signal arrives: the caller looks which.
    """
    b = e.b
    what = e.worker
    publish = b.icmp_unsigned("!=", what, const(WAIT))
    with b.if_then(publish):
        halt = b.icmp_unsigned("==", what, const(HALT))
        with b.if_then(halt):
            b.atomic_rmw("xchg", _word(e, STOP), const(1), "seq_cst")
        b.store(e.workers, _word(e, PENDING))
        generation = b.add(b.load(_word(e, GENERATION)), const(1))
        b.atomic_rmw("xchg", _word(e, GENERATION), generation, "seq_cst")
        with _if_any(e, SLEEPERS):
            _wake(e, GENERATION)
        with b.if_then(halt):
            b.store_atomic(generation, _word(e, FINISHED), "release", 8)
    finished = _word(e, FINISHED)
    old = b.load_atomic(finished, "acquire", 8)
    with b.if_then(b.icmp_unsigned("!=", old, b.load(_word(e, GENERATION)))):
        # No spin: with a worker on every core the caller would take its time from one of them.
        b.atomic_rmw("xchg", _word(e, CALLER_SLEEPS), const(1), "seq_cst")
        _sleep(e, FINISHED, old, b.ptrtoint(_word(e, POLL_SECONDS), I64))
        b.store_atomic(const(0), _word(e, CALLER_SLEEPS), "monotonic", 8)


def emit_read_tsc(e: Emitter) -> None:
    """IR of `read_tsc`: stores the time stamp counter at `sink`."""
    e.store(_ticks(e), e.arg["sink"], const(0))


def _barrier(e: Emitter, phase: Value, leave: Value) -> None:
    """All workers arrive, then all go on; to `leave` when the pool was told to stop meanwhile.

    Two levels, so that no counter and no phase word is fought over by more than `GROUP` workers:
    the last of a group arrives for it at ARRIVED, the last of those moves every group's phase.
    """
    b = e.b
    now = b.load(phase)
    after = b.add(now, const(1))
    b.store(after, phase)
    groups = b.udiv(b.add(e.workers, const(GROUP - 1)), const(GROUP))
    group = b.udiv(e.worker, const(GROUP))
    members = e.minimum(b.sub(e.workers, b.mul(group, const(GROUP))), const(GROUP))

    def line(index: Value, word: int) -> Value:
        first = b.add(const(FIRST_WORKER + word), b.mul(e.workers, const(LINE)))
        return b.add(first, b.mul(index, const(_GROUP_WORDS)))

    # Nobody arrives again before the phase moves, so the plain resets are safe: the release of the
    # next atomic orders them.
    with _if_last(e, line(group, 0), members), _if_last(e, const(ARRIVED), groups):
        with e.for_range(const(0), groups) as index:
            b.store_atomic(after, _word(e, line(index, _GROUP_PHASE)), "release", 8)
        b.fence("seq_cst")
        with _if_any(e, PHASE_SLEEPERS), e.for_range(const(0), groups) as index:
            _wake(e, line(index, _GROUP_PHASE))
    own = line(group, _GROUP_PHASE)
    poll = b.ptrtoint(_word(e, POLL_SECONDS), I64)
    _wait(e, own, now, BARRIER_SPIN, PHASE_SLEEPERS, poll)
    e.leave_if(b.icmp_unsigned("==", b.load_atomic(_word(e, own), "acquire", 8), now), leave)


@contextmanager
def _if_last(e: Emitter, counter: Value, members: Value) -> Iterator[None]:
    """Arrive at `counter`; the last of `members` resets it and runs the body."""
    b = e.b
    arrived = b.atomic_rmw("add", _word(e, counter), const(1), "acq_rel")
    with b.if_then(b.icmp_unsigned("==", arrived, b.sub(members, const(1)))):
        b.store_atomic(const(0), _word(e, counter), "monotonic", 8)
        yield


def _wait(
    e: Emitter, word: int | Value, old: Value, spin: int, sleepers: int, poll: Value | None = None
) -> None:
    """Wait until `word` differs from `old`; with `poll` (a timespec's address) also until STOP is
    set."""
    b = e.b
    pointer = _word(e, word)
    changed = _spin(e, pointer, old, spin)
    with b.if_then(b.not_(changed)):
        b.atomic_rmw("add", _word(e, sleepers), const(1), "seq_cst")
        with e.forever() as done:
            over = b.icmp_unsigned("!=", b.load_atomic(pointer, "acquire", 8), old)
            if poll is not None:
                over = b.or_(over, _stopped(e))
            e.leave_if(over, done)
            _sleep(e, word, old, poll if poll is not None else const(0))
        b.atomic_rmw("sub", _word(e, sleepers), const(1), "seq_cst")


def _spin(e: Emitter, pointer: Value, old: Value, limit: int) -> Value:
    """Spin until the word changes or the ticks in control word `limit` are over; i1: it changed."""
    b = e.b
    result = e.local(I1)
    cycles = b.load(_word(e, limit))
    start = _ticks(e)
    with e.forever() as done:
        changed = b.icmp_unsigned("!=", b.load_atomic(pointer, "acquire", 8), old)
        b.store(changed, result)
        e.leave_if(changed, done)
        e.call(e.tier.pause, ir.VoidType())
        e.leave_if(b.icmp_unsigned(">=", b.sub(_ticks(e), start), cycles), done)
    return b.load(result)


@contextmanager
def _if_any(e: Emitter, word: int) -> Iterator[None]:
    count = e.b.load_atomic(_word(e, word), "seq_cst", 8)
    with e.b.if_then(e.b.icmp_unsigned("!=", count, const(0)), likely=False):
        yield


def _sleep(e: Emitter, word: int | Value, old: Value, timeout: Value) -> None:
    """Futex wait while the low half of `word` equals that of `old`."""
    expected = e.b.zext(e.b.trunc(old, I32), I64)
    _futex(e, word, _FUTEX_WAIT_PRIVATE, expected, timeout)


def _wake(e: Emitter, word: int | Value) -> None:
    _futex(e, word, _FUTEX_WAKE_PRIVATE, const(0x7FFFFFFF), const(0))


def _futex(e: Emitter, word: int | Value, operation: int, value: Value, timeout: Value) -> None:
    address = e.b.ptrtoint(_word(e, word), I64)
    e.system_call(_FUTEX, address, const(operation), value, timeout)


def _stopped(e: Emitter) -> Value:
    return e.b.icmp_unsigned("!=", e.b.load_atomic(_word(e, STOP), "acquire", 8), const(0))


def _ticks(e: Emitter) -> Value:
    return e.call("llvm.readcyclecounter", I64)


def _word(e: Emitter, index: int | Value) -> Value:
    control = e.function.args[0]
    return e.b.gep(control, [const(index) if isinstance(index, int) else index])
