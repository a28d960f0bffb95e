"""Heads of linear attention as its kernels see them: where their keys, values and states lie, and
how workers share them.

Columns of values do not depend on each other, so workers share heads by columns of their states,
and each takes all tokens in order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from hmc.codegen.ir import F32, Emitter, Value, const
from hmc.codegen.vector import load_f32

_COLUMNS = 64
"""Columns of a state that are never shared between workers: whole cache lines, and whole tiles."""


class Heads:
    """The sizes of a spec, and places in the arguments of a kernel."""

    def __init__(self, e: Emitter) -> None:
        self.e = e
        sizes = ("heads", "key_heads", "key_dim", "value_dim", "channels", "delta")
        self.heads, self.key_heads, self.keys, self.values, self.channels, self.delta = (
            e.spec[name] for name in sizes
        )
        self.tiled = e.spec.get("tiled")
        self.pitch = -(-self.keys // e.lanes) * e.lanes
        """Elements from one row of keys to the next in scratch."""

    @contextmanager
    def share(self) -> Iterator[tuple[Value, Value, Value]]:
        """Emit a loop over the heads of this call's share: (head, first column, column behind the
        last).
        """
        e, b = self.e, self.e.b
        slices = -(-self.values // _COLUMNS)
        start, stop = e.split(const(self.heads * slices))
        last = b.udiv(b.add(stop, const(slices - 1)), const(slices))
        with e.for_range(b.udiv(start, const(slices)), last) as head:
            begin = b.mul(head, const(slices))
            low = b.mul(e.positive(b.sub(start, begin)), const(_COLUMNS))
            high = e.minimum(b.mul(b.sub(stop, begin), const(_COLUMNS)), const(self.values))
            with b.if_then(b.icmp_signed("<", low, high)):
                yield head, low, high

    def columns(
        self, low: Value, high: Value, size: int, body: Callable[[Value, int], None]
    ) -> None:
        """Emit `body(column, count)` over the columns [low, high) of a share in blocks of `size`,
        which divides `_COLUMNS`; the last of a head may be shorter.
        """
        e, whole = self.e, self.values // size * size
        if whole:
            with e.for_range(low, e.minimum(high, const(whole)), size) as column:
                body(column, size)
        if whole < self.values:
            with e.b.if_then(e.b.icmp_signed(">", high, const(whole))):
                body(const(whole), self.values - whole)

    def state(self, slot: Value, head: Value) -> Value:
        """The state of a head [keys, values] in a slot."""
        number = self.e.b.add(self.e.b.mul(slot, const(self.heads)), head)
        at = self.e.b.mul(number, const(self.keys * self.values))
        return self.e.at(self.e.arg["state"], at, F32)

    def row(self, name: str, token: Value, head: Value) -> Value:
        """A head's columns of argument q, k, v or y in the row of a token."""
        if name in "vy":
            return self.e.row(name, token, head, self.values)
        if self.tiled:
            served = self.e.b.urem(head, const(self.key_heads))
        else:
            served = self.e.b.udiv(head, const(self.heads // self.key_heads))
        return self.e.row(name, token, served, self.keys)

    def decays(self, token: Value, head: Value) -> Callable[[Value, int], Value]:
        """Vectors of what a head's rows of keys decay by, from a row on, as many as are counted."""
        place = self.e.row("decay", token, head, self.keys if self.channels else 1)
        if self.channels:
            return lambda index, count: load_f32(self.e, "f32", place, index, count)
        every = self.e.splat(self.e.load(place, const(0), F32), self.e.lanes)
        return lambda index, count: every

    def beta(self, token: Value, head: Value) -> Value:
        """f32."""
        return self.e.load(self.e.row("beta", token), head, F32)
