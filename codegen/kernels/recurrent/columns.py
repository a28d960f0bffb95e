"""What kernels share whose columns do not depend on each other and have a state a sequence: work is
split by column, and each worker takes the tokens of its columns in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hmc.codegen.ir import I64, Emitter, Value, const


def for_columns(e: Emitter, width: int, size: int, body: Callable[[Value, int], None]) -> None:
    """Emit `body(column, count)` over this worker's share of `width` columns, in blocks of `size`;
    the last may be shorter.
    """
    whole = width // size * size
    start, stop = e.split(const(width), size)
    if whole:
        with e.for_range(start, e.minimum(stop, const(whole)), size) as column:
            body(column, size)
    if whole < width:
        with e.b.if_then(e.b.icmp_signed("==", stop, const(width))):
            body(const(whole), width - whole)


@contextmanager
def in_order(
    e: Emitter, load: Callable[[Value], None], store: Callable[[Value], None]
) -> Iterator[Value]:
    """The tokens, one after the other: yields each. `load(slot)` comes before the first of a run of
    tokens with the same slot (i64), `store(slot)` after the last.
    """
    b = e.b
    held = e.local(I64)
    b.store(const(-1), held)

    def leave() -> None:
        with b.if_then(b.icmp_signed(">=", b.load(held), const(0))):
            store(b.load(held))

    with e.for_range(0, e.arg["tokens"]) as token:
        slot = e.load_int(e.arg["sequence"], token)
        with b.if_then(b.icmp_signed("!=", slot, b.load(held))):
            leave()
            load(slot)
            b.store(slot, held)
        yield token
    leave()
