"""Dot products of rows of GGUF's blocks with up to 16 tokens, in whole numbers: activations are
rounded as in whole.py, in chunks of whole blocks, so sums of codes are exact; they go times the
scale of their columns into the chunk's sum, and that times the token's factor. Codes are less by
their least value, which, as minima are, is multiplied by sums of activations; these stand behind
the prepared row.

    tiers               codes of less than a byte       of a byte
    with `vpdpbusd`     bytes, activations in two       words of 16 bits
    without             words of 16 bits                words of 16 bits

`prepare` brings activations into the order in which codes lie (kquants.py), so weights never move
between lanes. They are decoded where they are first multiplied: few are in registers at a time.
Pairs of bf16 take a look-up of each word first, so they are the form of many tokens alone
(block_micro.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from hmc.codegen.formats.block_kind import BYTES as CODES
from hmc.codegen.formats.block_kind import LANES, WORDS, Block, Kind
from hmc.codegen.formats.code_words import BYTES, RAISED, Words, moved
from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.kquants import KINDS, OF_BYTES
from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.whole import (
    LARGEST,
    add_bytes,
    bf16_values,
    multiply_words,
    whole_numbers,
)
from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, const, fconst, lanes_mask, vec
from hmc.codegen.vector import concat, for_blocks, in_groups, isplat
from hmc.formats import format_of


@dataclass(frozen=True)
class BlockDot(Dot):
    """`Dot` for blocks, in words of 16 bits."""

    words: ClassVar[Words] = RAISED
    largest: ClassVar[float] = LARGEST
    """What the largest of a chunk's activations becomes."""

    @property
    def lanes(self) -> int:
        """Of 64 codes, whatever a vector of the tier holds."""
        return LANES

    @property
    def kind(self) -> Kind:
        """Of its format."""
        return KINDS[self.spec.weight]

    @property
    def scaled(self) -> bool:
        """Chunks have factors of their own."""
        return True

    @property
    def beside(self) -> Callable[[Block], Value] | None:
        """Minima, or what codes mean less."""
        return self.kind.minima or (self.kind.lifted if self.kind.least else None)

    @property
    def unit(self) -> int:
        """Columns decoded together."""
        return self.kind.unit

    @property
    def chunk(self) -> int:
        """Columns a step of the loop."""
        return max(128, self.unit)

    @property
    def _sums(self) -> int:
        """Byte offset of the sums of a prepared row."""
        return -(-self.k // self.chunk) * self.chunk * 2

    @property
    def _factors(self) -> int:
        """Byte offset of the factors."""
        units = -(-self.k // self.chunk) * self.chunk // self.unit
        return self._sums + (units * LANES * 4 if self.beside else 0)

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one prepared row, a multiple of 64."""
        return self._factors + -(-self._chunks * 4 // 64) * 64

    def _order(self) -> list[int]:
        return [column for step in self.kind.columns for column in step]

    def prepare(self, e: Emitter, x: Value, prepared: Value) -> None:
        """Write the bf16 row at `x`. A row with an infinity or a NaN has NaN for the factor of that
        chunk.
        """
        for_blocks(e, self.k, self.chunk, partial(self._prepare_chunk, e, x, prepared))

    def _prepare_chunk(self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int) -> None:
        b, order = e.b, self._order()
        values = bf16_values(e, x, k, self.chunk, valid, LANES)
        whole, factor = whole_numbers(e, values, self.largest)
        factors = e.offset(prepared, const(self._factors))
        e.store(factor, factors, b.udiv(k, const(self.chunk)), align=4)
        for start in range(0, self.chunk, len(order)):
            some = concat(e, whole[start // LANES : (start + len(order)) // LANES])
            self._store(e, some, order, prepared, b.add(k, const(start)))
        if self.beside is None:
            return
        up, least = isplat(16, LANES), I32(self.kind.least or 1)
        signed = [b.ashr(b.shl(each, up), up) for each in whole]
        sums = (e.reduce(some, b.add) for some in in_groups(signed, self.kind.summed, b.add))
        self._store_sums(e, prepared, k, [b.sitofp(b.mul(sum_, least), F32) for sum_ in sums])

    def _store(self, e: Emitter, whole: Value, order: list[int], prepared: Value, k: Value) -> None:
        """Whole numbers `<n x i32>` from column `k` on in the order of codes, as they are
        multiplied.
        """
        words = e.b.trunc(whole, vec(I16, len(order)))
        for at in range(0, len(order), WORDS):
            vector = e.b.shuffle_vector(words, words, lanes_mask(order[at : at + WORDS]))
            e.store(vector, prepared, e.b.add(k, const(at)), align=32)

    def _store_sums(self, e: Emitter, prepared: Value, k: Value, sums: list[Value]) -> None:
        """Sums of each `summed` columns from column `k` on: of a unit a vector, zeros in the lanes
        that have none.
        """
        at, b = self.kind.at, e.b
        target = e.offset(prepared, const(self._sums))
        unit = b.mul(b.udiv(k, const(self.unit)), const(LANES))
        for lane in set(range(LANES)).difference(at):
            e.store(fconst(0.0), target, b.add(unit, const(lane)))
        before = b.udiv(b.urem(k, const(self.unit)), const(self.kind.summed))
        first = b.add(unit, b.mul(before, const(at.step)))
        for lane, sum_ in zip(at, sums, strict=False):
            e.store(sum_, target, b.add(first, const(lane)))

    def load(self, e: Emitter, row: Row, k: Value, valid: int) -> Value:
        """The blocks of the unit at element `k`."""
        columns, size = format_of(self.spec.weight).codes.block
        address = e.offset(row.codes, e.b.mul(e.b.udiv(k, const(columns)), const(size)))
        return Block(e, self.words, address, min(valid, self.unit) // columns, size)

    def decode(self, e: Emitter, codes: Value, tokens: int = 1) -> list[Value]:
        """The unit and a step of it, each: what is multiplied is decoded, once, by `multiply`."""
        return [(codes, step) for step in range(self.kind.steps + (self.beside is not None))]

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Vectors of the step, or the sums that go with what is `beside`."""
        if step == self.kind.steps:
            first = e.b.mul(e.b.udiv(k, const(self.unit)), const(LANES))
            sums = e.offset(prepared, const(self._sums))
            return [e.load_vec(sums, first, F32, LANES, align=64)]
        size = self.unit // self.kind.steps
        starts = range(step * size, (step + 1) * size, WORDS)
        return [e.load_vec(prepared, e.b.add(k, const(at)), I16, WORDS, align=64) for at in starts]

    def multiply(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """`total` + the sum of a step, scaled."""
        (block, step), kind = weights, self.kind
        if step == kind.steps:
            assert self.beside is not None
            return e.fma(block.once(self.beside), activations[0], total)
        found = self._sum(e, block.once(kind.vectors, step), activations)
        return e.fma(found, block.once(kind.scales, step), total)

    def _sum(self, e: Emitter, words: list[Value], activations: list[Value]) -> Value:
        found: Value = e.zeros(I32, LANES)
        for word, vector in zip(words, activations, strict=True):
            found = multiply_words(e, found, word, vector)
        return e.b.sitofp(found, vec(F32, LANES))

    def token_factor(self, e: Emitter, prepared: Value, k: Value) -> Value | None:
        """That of the chunk's activations."""
        factors = e.offset(prepared, const(self._factors))
        return e.splat(e.load(factors, e.b.udiv(k, const(self.chunk)), F32), LANES)


class ByteBlockDot(BlockDot):
    """Of bytes: an activation is 256 times one signed byte and another one. Of each vector of codes
    `prepare` writes the upper bytes, then the lower ones.
    """

    words = BYTES
    largest = 127.0 * 256 + 127

    @property
    def kind(self) -> Kind:
        """Of its format."""
        return OF_BYTES[self.spec.weight]

    def _order(self) -> list[int]:
        """Words of even and of odd places as the bytes that they are of."""
        words = super()._order()
        return [
            words[at + place + odd * WORDS]
            for at in range(0, len(words), CODES)
            for place in range(WORDS)
            for odd in range(2)
        ]

    def _store(self, e: Emitter, whole: Value, order: list[int], prepared: Value, k: Value) -> None:
        b, kind = e.b, vec(I8, len(order))
        rounded = b.add(whole, isplat(128, len(order)))
        halves = b.trunc(moved(e, rounded, -8), kind), b.trunc(whole, kind)
        for at in range(0, len(order), CODES):
            for place, half in enumerate(halves):
                vector = b.shuffle_vector(half, half, lanes_mask(order[at : at + CODES]))
                words = b.bitcast(vector, vec(I16, WORDS))
                e.store(words, prepared, b.add(k, const(at + place * WORDS)), align=64)

    def _sum(self, e: Emitter, words: list[Value], activations: list[Value]) -> Value:
        found: Value = e.zeros(I32, LANES)
        for half in range(2):
            found = moved(e, found, 8 * half)
            for codes, vector in zip(words, activations[half::2], strict=True):
                found = add_bytes(e, found, codes, vector)
        return e.b.sitofp(found, vec(F32, LANES))
