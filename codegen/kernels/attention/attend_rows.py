"""Sizes of decode attention, and where a task finds its operands: queries, and the rows of a paged
cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd

from llvmlite import ir

from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.attention.options import chosen_place
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import dot_pairs, isplat

PARTITION = 256
"""Positions of one task."""

NEVER = float("-inf")

LATENT = frozenset({"mla_attention", "mla_attention_join", "mla_prefill", "sparse_mla_prefill"})
"""Ops whose cache has one row for all heads, which is latent."""


@dataclass(frozen=True)
class Multiplies:
    """How a tier multiplies queries and weights by cache rows."""

    isa: str

    @property
    def lanes(self) -> int:
        """f32 lanes of a vector."""
        return TIERS[self.isa].lanes

    @property
    def dot(self) -> bool:
        """Whether pairs of bf16 are multiplied."""
        return TIERS[self.isa].pair_dot

    @property
    def step(self) -> int:
        """Elements (of a key, or positions of a value) that one multiply takes."""
        return 2 if self.dot else 1

    @property
    def word(self) -> ir.Type:
        """What one multiply takes a lane."""
        return I32 if self.dot else F32

    def multiply_add(self, e: Emitter, total: Value, left: Value, right: Value) -> Value:
        """total + left * right: f32 lanes, vectors of words."""
        return dot_pairs(e, total, left, right) if self.dot else e.fma(left, right, total)


@dataclass(frozen=True)
class Shape(Multiplies):
    """Sizes of one attention kernel.

    `heads` query heads share `kv_heads` cache rows of `key` elements (the value: the first `value`
    elements of a row of `value_row`). A head group is `members` heads in `width` lanes.
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    value_row: int
    block: int
    terms: int
    index_block: int = 0

    @staticmethod
    def of(spec: KernelSpec) -> Shape:
        """The shape of `attention` or, where one latent row is the key and the value of all heads,
        of `mla_attention`; and of their joins.
        """
        sizes, block = (spec.isa, spec["heads"]), spec["block"]
        if spec.op in LATENT:
            rank, row = spec["rank"], spec["rank"] + spec["rope"]
            return Shape(*sizes, 1, row, rank, row, block, terms=1)
        value = spec["v_dim"]
        return Shape(
            *sizes,
            spec["kv_heads"],
            spec["head_dim"],
            value,
            value,
            block,
            terms=2,
            index_block=spec.get("index_block"),
        )

    @property
    def sums(self) -> int:
        """Vectors that are summed up at once: half of the registers."""
        return TIERS[self.isa].registers // 2

    @property
    def members(self) -> int:
        """Heads of a group: the most that divide the heads of one cache row and fit a vector."""
        per = self.heads // self.kv_heads
        return max(count for count in range(1, self.lanes + 1) if per % count == 0)

    @property
    def width(self) -> int:
        """Lanes that a group's heads take: 4, 8 or 16."""
        return max(4, 1 << (self.members - 1).bit_length())

    @property
    def groups(self) -> int:
        """Head groups of a token."""
        return self.heads // self.members

    @property
    def run(self) -> int:
        """Positions that are sure to lie in one block, at a constant distance."""
        return gcd(self.block, PARTITION, self.index_block)

    @property
    def tile(self) -> int:
        """Positions scored at once: as many as there are registers for."""
        return max(count for count in range(2, self.sums + 1, 2) if self.run % count == 0)

    @property
    def record_bytes(self) -> int:
        """A record: result f32 [members, value], then maximum and sum f32 [width] each."""
        return (self.members * self.value + 2 * self.width) * 4 + 63 & ~63


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
    """Cache rows of one partition of what a token reads, seen by one key head."""

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
            position = chosen_place(e, token, kv_head, position)
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
