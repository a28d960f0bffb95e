"""Activations in the order in which the columns of a weight lie in memory, where that is one of
their own (planes of kind order): all that multiplies knows nothing of it.
"""

from __future__ import annotations

from hmc.codegen.formats.planes import Beside, addresses
from hmc.codegen.ir import I8, I16, I32, Emitter, Value, const
from hmc.codegen.vector import for_blocks

_TOGETHER = 8
"""Elements of one store."""


def has_order(planes: tuple[Beside, ...]) -> bool:
    """Whether columns lie in an order of their own."""
    return any(plane.kind == "order" for plane in planes)


def order_of(e: Emitter, planes: tuple[Beside, ...], beside: Value) -> Value:
    """i8* of the order of a matrix that has one: which column lies at each place, i32."""
    places = zip(planes, addresses(e, planes, beside), strict=True)
    return next(address for plane, address in places if plane.kind == "order")


def room(e: Emitter, count: int) -> Value:
    """A stack array for `gather` of `count` elements."""
    array = e.buffer(I16, -(-count // _TOGETHER) * _TOGETHER)
    return e.b.bitcast(array, I8.as_pointer())


def gather(e: Emitter, x: Value, order: Value, first: Value, count: int, target: Value) -> None:
    """target[i] = x[order[first + i]] for i < `count`: 16 bits each; `target` is as `room` makes
    it.
    """

    def some(start: Value, valid: int) -> None:
        part: Value = e.zeros(I16, _TOGETHER)
        for lane in range(valid):
            column = e.load_int(order, e.b.add(first, e.b.add(start, const(lane))), align=4)
            part = e.b.insert_element(part, e.load(x, column, I16), I32(lane))
        e.store(part, target, start, align=2 * _TOGETHER)

    for_blocks(e, count, _TOGETHER, some)
