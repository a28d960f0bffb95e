"""Dot products of rows of GGUF's blocks: sums of codes go times the scale of their columns into the
row's total. `prepare` brings activations into the order in which
codes are decoded (kquants.py), so weights never move between lanes; minima are multiplied by sums
of activations, which stand behind the prepared row.

Weights are decoded where they are first multiplied, not before: few are in registers at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from hmc.codegen.formats.block_kind import LANES, WORDS, Block, Kind
from hmc.codegen.formats.code_words import PAIRS, Words
from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.kquants import KINDS
from hmc.codegen.formats.planes import Row
from hmc.codegen.ir import F32, I16, Emitter, Value, const, lanes_mask
from hmc.codegen.vector import bf16_bits, dot_pairs, in_groups
from hmc.formats import format_of


@dataclass(frozen=True)
class BlockDot(Dot):
    """`Dot` for blocks on tiers with `vdpbf16ps`."""

    words: ClassVar[Words] = PAIRS

    @property
    def lanes(self) -> int:
        """Of 64 codes, whatever a vector of the tier holds."""
        return LANES

    @property
    def kind(self) -> Kind:
        """Of its format."""
        return KINDS[self.spec.weight]

    @property
    def paired(self) -> bool:
        """Products are of bf16 pairs."""
        return True

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
    def prepared_bytes(self) -> int:
        """Bytes of one prepared row, a multiple of 64."""
        return self._sums + (self._sums // 2 // self.kind.summed * 4 + 63) // 64 * 64

    def _order(self) -> list[int]:
        return [column for step in self.kind.columns for column in step]

    def _prepare_unit(
        self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int
    ) -> list[Value]:
        found = super()._prepare_unit(e, x, prepared, k, valid)
        if self.kind.minima is None:
            return found
        sums = e.offset(prepared, const(self._sums))
        vectors = [e.bf16_to_f32(each) for each in
                   bf16_bits(e, x, k, self.kind.period, valid, LANES)]  # fmt: skip
        first = e.b.udiv(k, const(self.kind.summed))
        for number, some in enumerate(in_groups(vectors, self.kind.summed, e.b.fadd)):
            e.store(e.reduce_add(some), sums, e.b.add(first, const(number)))
        return found

    def load(self, e: Emitter, row: Row, k: Value, valid: int) -> Value:
        """The blocks of the unit at element `k`."""
        columns, size = format_of(self.spec.weight).codes.block
        address = e.offset(row.codes, e.b.mul(e.b.udiv(k, const(columns)), const(size)))
        return Block(e, self.words, address, min(valid, self.unit) // columns, size)

    def decode(self, e: Emitter, codes: Value, tokens: int = 1) -> list[Value]:
        """The unit and a step of it, each: what is multiplied is decoded, once, by `multiply`."""
        return [(codes, step) for step in range(self.kind.steps + (self.kind.minima is not None))]

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Vectors of the step, or the sums that go with minima."""
        if step == self.kind.steps:
            first, count = (e.b.udiv(k, const(self.kind.summed)), self.unit // self.kind.summed)
            sums = e.offset(prepared, const(self._sums))
            some = e.load_vec(sums, first, F32, count)
            return [_placed(e, some, self.kind.minima_at)]
        size = self.unit // self.kind.steps
        starts = range(step * size, (step + 1) * size, WORDS)
        return [e.load_vec(prepared, e.b.add(k, const(at)), I16, WORDS, align=64) for at in starts]

    def multiply(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """`total` + the sum of a step, scaled."""
        (block, step), kind = weights, self.kind
        if step == kind.steps:
            assert kind.minima is not None
            return e.fma(block.once(kind.minima), activations[0], total)
        found = self._sum(e, block.once(kind.vectors, step), activations)
        return e.fma(found, block.once(kind.scales, step), total)

    def _sum(self, e: Emitter, words: list[Value], activations: list[Value]) -> Value:
        """Of products of words, in f32."""
        found: Value = e.zeros(F32, LANES)
        for vector, one in zip(words, activations, strict=True):
            found = dot_pairs(e, found, vector, one)
        return found


def _placed(e: Emitter, some: Value, first: int) -> Value:
    """`some` from lane `first` of a vector on, among zeros."""
    count = some.type.count
    mask = [count] * first + list(range(count)) + [count] * (LANES - first - count)
    return e.b.shuffle_vector(some, ir.Constant(some.type, None), lanes_mask(mask[:LANES]))
