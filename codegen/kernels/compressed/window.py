"""The last rows of keys of a sequence: `window` of them in its slot, the row of position p at place
p mod window.
"""

from __future__ import annotations

from hmc.codegen.ir import I16, Emitter, Value, const
from hmc.codegen.vector import copy_row


def _slot(e: Emitter, token: Value) -> Value:
    """Where the rows of a token's sequence begin (i16*)."""
    row = e.b.mul(e.load_int(e.arg["sequence"], token), e.arg["window_stride"])
    return e.at(e.arg["window"], row, I16)


def emit_window_append(e: Emitter) -> None:
    """`window_append`: split by token, each of another sequence."""
    b, width, window = e.b, e.spec["head_dim"], e.spec["window"]
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        position = e.load_int(e.arg["positions"], token)
        with b.if_then(b.icmp_signed(">=", position, const(0))):
            place = b.mul(b.urem(position, const(window)), const(width))
            target = e.at(_slot(e, token), place, I16)
            copy_row(e, "f32", e.row("kv", token), "bf16", target, width, 2)


def emit_window_gather(e: Emitter) -> None:
    """`window_gather`: split by place in the window, whose old row is read before the new ones of
    the call are written.
    """
    b, width, window = e.b, e.spec["head_dim"], const(e.spec["window"])
    first = e.load_int(e.arg["positions"], const(0))
    slot = _slot(e, const(0))

    def row(base: Value, number: Value) -> Value:
        return e.at(base, b.mul(number, const(width)), I16)

    start, stop = e.split(window)
    with e.for_range(start, stop) as place:
        held = row(slot, place)
        back = b.urem(b.sub(b.add(first, window), b.add(place, const(1))), window)
        with b.if_then(b.icmp_signed("<", back, first)):
            gathered = row(e.arg["gathered"], b.sub(window, b.add(back, const(1))))
            copy_row(e, "bf16", held, "bf16", gathered, width, 2)
        ahead = b.urem(b.sub(b.add(place, window), b.urem(first, window)), window)
        with e.for_range(ahead, e.arg["tokens"], window) as token:
            gathered = row(e.arg["gathered"], b.add(window, token))
            for target in (gathered, held):
                copy_row(e, "f32", e.row("kv", token), "bf16", target, width, 2)
