"""Where an attention task finds its operands: queries, and the rows of a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hmc.codegen.ir import I32, I64, Emitter, Value, const
from hmc.codegen.kernels.attention.attend import PARTITION, Shape

L2, L1 = 2, 3
"""Prefetch hints: what is needed a phase from now, and what is needed next."""


@dataclass(frozen=True)
class Source:
    """Where a task finds its operands.

    A query is the concatenation of `segments`: (address of the f32 part of (token, head), its even
    number of elements). `values_apart` says that values are rows of their own, not the beginning of
    the key rows.
    """

    segments: tuple[tuple[Callable[[Value, Value], Value], int], ...]
    keys: Value
    values: Value
    values_apart: bool


class Rows:
    """Cache rows of one partition of a token's context, seen by one key head."""

    def __init__(self, e: Emitter, shape: Shape) -> None:
        self.e, self.shape = e, shape
        self._numbers = buffer(e, I64, PARTITION // shape.run + 1)

    def find(self, token: Value, start: Value, count: Value, kv_head: Value) -> None:
        """Code that looks up `count` positions from `start` on, a run of them at a time."""
        e, b, s = self.e, self.e.b, self.shape
        sequence = b.sext(e.load(e.arg["sequence"], token, I32), I64)
        table = e.at(e.arg["tables"], b.mul(sequence, e.arg["table_stride"]), I32)
        runs = b.udiv(b.add(count, const(s.run - 1)), const(s.run))
        with e.for_range(0, runs) as index:
            position = b.add(start, b.mul(index, const(s.run)))
            number = b.sext(e.load(table, b.udiv(position, const(s.block)), I32), I64)
            row = b.add(b.mul(number, const(s.kv_heads)), kv_head)
            row = b.add(b.mul(row, const(s.block)), b.urem(position, const(s.block)))
            # Counted over blocks, heads and slots.
            e.store(row, self._numbers, index)
        # What lies behind is never read, only fetched ahead.
        with e.for_range(runs, PARTITION // s.run + 1) as index:
            e.store(e.load(self._numbers, const(0), I64), self._numbers, index)

    def address(self, base: Value, elements: int, position: Value) -> Value:
        """Address of the row of the partition's `position`, a multiple of 2."""
        e, b, s = self.e, self.e.b, self.shape
        row = e.load(self._numbers, b.udiv(position, const(s.run)), I64)
        row = b.add(row, b.urem(position, const(s.run)))
        return e.offset(base, b.mul(row, const(2 * elements)))


def buffer(e: Emitter, element: Value, count: int) -> Value:
    """A stack array on a cache line boundary."""
    slot = e.local(element, count=count)
    slot.align = 64
    return slot
