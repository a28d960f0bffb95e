"""Where an attention task finds its operands: queries, and the rows of a paged cache."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hmc.codegen.ir import I32, I64, Emitter, Value, const, vec
from hmc.codegen.kernels.attention.attend import PARTITION, Shape
from hmc.codegen.vector import isplat

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


class Pages:
    """Where the block table of `token`'s sequence says that cache rows lie."""

    def __init__(self, e: Emitter, token: Value, block: int, kv_heads: int) -> None:
        b = e.b
        self.e, self.block, self.kv_heads = e, block, kv_heads
        row = b.mul(e.load_int(e.arg["sequence"], token), e.arg["table_stride"])
        self._table = e.at(e.arg["tables"], row, I32)

    def row(self, position: Value, kv_head: Value) -> Value:
        """Row of the cache, counted over blocks, heads and slots."""
        e, b, block = self.e, self.e.b, const(self.block)
        number = e.load_int(self._table, b.udiv(position, block))
        row = b.add(b.mul(number, const(self.kv_heads)), kv_head)
        return b.add(b.mul(row, block), b.urem(position, block))


class Rows:
    """Cache rows of one partition of a token's context, seen by one key head."""

    def __init__(self, e: Emitter, shape: Shape) -> None:
        self.e, self.shape = e, shape
        self._numbers = e.buffer(I64, PARTITION // shape.run + 1)

    def find(self, token: Value, start: Value, count: Value, kv_head: Value) -> None:
        """Code that looks up `count` positions from `start` on, a run of them at a time."""
        e, b, s = self.e, self.e.b, self.shape
        pages = Pages(e, token, s.block, s.kv_heads)
        runs = b.udiv(b.add(count, const(s.run - 1)), const(s.run))
        with e.for_range(0, runs) as index:
            position = b.add(start, b.mul(index, const(s.run)))
            e.store(pages.row(position, kv_head), self._numbers, index)
        # What lies behind is never read, only fetched ahead.
        with e.for_range(runs, PARTITION // s.run + 1) as index:
            e.store(e.load(self._numbers, const(0), I64), self._numbers, index)

    def address(self, base: Value, elements: int, position: Value) -> Value:
        """Address of the row of the partition's `position`, a multiple of 2."""
        e, b, s = self.e, self.e.b, self.shape
        row = e.load(self._numbers, b.udiv(position, const(s.run)), I64)
        row = b.add(row, b.urem(position, const(s.run)))
        return e.offset(base, b.mul(row, const(2 * elements)))


def pair_words(e: Emitter, low: Value, high: Value) -> Value:
    """bf16 pairs (i32 lanes) of two vectors of bf16 bits."""
    kind = vec(I32, low.type.count)
    wide = [e.b.zext(half, kind) for half in (low, high)]
    return e.b.or_(wide[0], e.b.shl(wide[1], isplat(16, kind.count)))
