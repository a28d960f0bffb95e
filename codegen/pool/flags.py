"""`flag_wait` and `flag_set`: how a native program meets devices, by words in host memory.

A flag holds the number of the latest call (*epoch*) in which what it stands for has happened, so
nothing is ever reset. Epochs are compared as GPUs do: modulo 2^32, and "reached" is less than half
the way round ahead. Worker 0 alone waits, so that a device's write takes the line from one core
only; the others wait at the barrier that follows (codegen/pool/walker.py: GATE).

Whoever gives a call up sets `abort` first and then releases all flags. So abort is looked at after
the flag: a flag that was only released is never taken for one that happened.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.ir import I32, I64, Emitter, Value, const

_NANOSLEEP = 35
_NAP_NANOSECONDS = 20_000
"""Between two looks once spinning is over; the kernel adds its timer slack, some 50 us."""


def emit_flag_wait(e: Emitter) -> None:
    """IR of `flag_wait`."""
    b = e.b
    with b.if_then(b.icmp_signed("==", e.worker, const(0))):
        start = e.call("llvm.readcyclecounter", I64)
        with e.forever() as done:
            ahead = b.sub(_load(e, "flag"), b.trunc(e.arg["epoch"], I32))
            reached = b.icmp_signed(">=", ahead, ir.Constant(I32, 0))
            e.leave_if(b.or_(reached, _aborted(e)), done)
            e.call(e.tier.pause, ir.VoidType())
            spent = b.sub(e.call("llvm.readcyclecounter", I64), start)
            with b.if_then(b.icmp_unsigned(">=", spent, e.arg["spin"])):
                _nap(e)
        b.store(b.zext(_aborted(e), I64), e.function.args[0])  # given_up is the first word


def emit_flag_set(e: Emitter) -> None:
    """IR of `flag_set`; its record has a barrier, so that everybody's work is done before."""
    b = e.b
    with b.if_then(b.icmp_signed("==", e.worker, const(0))):
        word = b.bitcast(e.arg["flag"], I32.as_pointer())
        b.store_atomic(b.trunc(e.arg["epoch"], I32), word, "release", 4)


def _aborted(e: Emitter) -> Value:
    return e.b.icmp_unsigned("!=", _load(e, "abort"), ir.Constant(I32, 0))


def _load(e: Emitter, name: str) -> Value:
    return e.b.load_atomic(e.b.bitcast(e.arg[name], I32.as_pointer()), "acquire", 4)


def _nap(e: Emitter) -> None:
    span = e.local(I64, count=2)
    e.b.store(const(0), span)
    e.b.store(const(_NAP_NANOSECONDS), e.b.gep(span, [const(1)]))
    e.system_call(_NANOSLEEP, e.b.ptrtoint(span, I64), const(0))
