"""Micro-kernels for blocks of GGUF: codes in words of 16 bits, as bf16 or as whole numbers, whose
sums of a group go times the group's scale into f32 totals. Minima go times the sums of activations,
which stand beside the packed tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from hmc.codegen.formats.block_rows import FOUR, KINDS, Kind, Rows
from hmc.codegen.formats.code_words import bf16_pairs, whole_pairs
from hmc.codegen.formats.interleave import Chunk, Zeros
from hmc.codegen.formats.micro import MicroKernel, Pairs, Vectors, WholeNumbers
from hmc.codegen.formats.whole import bf16_values
from hmc.codegen.ir import F32, I8, I16, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.native import GRAIN as CHUNK
from hmc.codegen.vector import in_groups, isplat
from hmc.formats import format_of


class OfBlocks(MicroKernel):
    """Blocks of GGUF: codes in words of 16 bits, columns in the order `FOUR`."""

    scales_sums = True
    whole: ClassVar[bool] = False
    """Whether codes are whole numbers, else bf16."""

    @property
    def kind(self) -> Kind:
        """Of its format."""
        return KINDS[self.spec.weight]

    @property
    def group(self) -> int:
        """Columns of a scale."""
        return self.kind.group

    @property
    def token_sums(self) -> int:
        """One a group, for minima."""
        return CHUNK // self.kind.group if self.kind.minima else 0

    def _activation(self, e: Emitter, bits: Value) -> Value:
        order = [at + place for at in range(0, self.lanes, len(FOUR)) for place in FOUR]
        return e.b.shuffle_vector(bits, bits, lanes_mask(order))

    def decode(
        self, e: Emitter, chunk: Chunk, scale: Callable[[], Value], zeros: Zeros | None
    ) -> None:
        """Pairs of codes, a word each."""
        rows = Rows.of(e, format_of(self.spec.weight), chunk)
        words = whole_pairs if self.whole else bf16_pairs
        for column, codes in self.kind.codes(rows):
            pairs = e.b.bitcast(codes, vec(I16, 2 * self.lanes))
            for number, word in enumerate(words(e, self.kind.values, pairs)):
                place = const((column // 2 + number) * chunk.stride)
                e.store(e.b.bitcast(word, codes.type), chunk.panel, place, align=4)

    def scales(self, e: Emitter, chunk: Chunk) -> list[tuple[Value, Value | None]]:
        """Those of each group, and its minimum, negative."""
        rows, kind = Rows.of(e, format_of(self.spec.weight), chunk), self.kind
        return [
            (kind.scales(rows, group), kind.minima(rows, group) if kind.minima else None)
            for group in range(-(-chunk.length // kind.group))
        ]


class BlockPairs(OfBlocks, Pairs):
    """In bf16."""

    def pack(
        self, e: Emitter, row: Value, k: Value, valid: int, size: int, factor: Value
    ) -> Vectors:
        """And the sums of groups."""
        if self.token_sums:
            values = bf16_values(e, row, k, size, valid, self.lanes)
            for place, sum_ in enumerate(in_groups(values, self.kind.group, e.b.fadd)):
                e.store(e.reduce_add(sum_), _bytes(e, factor), const(place), align=4)
        yield from super().pack(e, row, k, valid, size, factor)


class BlockWords(OfBlocks, WholeNumbers):
    """In whole numbers."""

    whole = True

    def _sum(self, e: Emitter, whole: list[Value], scale: Value, factor: Value) -> None:
        if not self.token_sums:
            return
        up = isplat(16, self.lanes)
        signed = [e.b.ashr(e.b.shl(value, up), up) for value in whole]
        for place, sum_ in enumerate(in_groups(signed, self.kind.group, e.b.add)):
            total = e.b.fmul(e.b.sitofp(e.reduce(sum_, e.b.add), F32), scale)
            e.store(total, _bytes(e, factor), const(1 + place), align=4)


def _bytes(e: Emitter, pointer: Value) -> Value:
    return e.b.bitcast(pointer, I8.as_pointer())
