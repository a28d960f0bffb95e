"""Dot products of rows of GGUF's blocks in whole numbers, on tiers without `vdpbf16ps` and, of
blocks with a byte a code, wherever there is `vpdpwssd` (`native.of_few`): activations are rounded
as in whole.py, in chunks of whole blocks, so sums of codes are exact; they go times the scale of
their columns into the chunk's sum, and that times the token's factor.
"""

from __future__ import annotations

from functools import partial

from hmc.codegen.formats.block_dot import BlockDot
from hmc.codegen.formats.block_kind import LANES, WORDS
from hmc.codegen.formats.code_words import RAISED
from hmc.codegen.formats.whole import bf16_values, multiply_words, whole_numbers
from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.vector import concat, for_blocks, in_groups, isplat, splat_int


class WholeBlockDot(BlockDot):
    """`BlockDot` in whole numbers; `prepare` writes the factor of each chunk behind the sums."""

    words = RAISED

    @property
    def scaled(self) -> bool:
        """Chunks have factors of their own."""
        return True

    @property
    def _factors(self) -> int:
        """Byte offset of the factors."""
        return super().prepared_bytes

    @property
    def _starts(self) -> int:
        """Byte offset of what sums start from, as codes are `RAISED`: 16 lanes a step."""
        return self._factors + -(-self._chunks * 4 // 64) * 64

    @property
    def _step(self) -> int:
        """Columns of a step."""
        return self.kind.unit // self.kind.steps

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one prepared row, a multiple of 64."""
        steps = self._chunks * self.chunk // self._step if self.kind.least else 0
        return self._starts + steps * LANES * 4

    def prepare(self, e: Emitter, x: Value, prepared: Value) -> None:
        """Write the bf16 row at `x`. A row with an infinity or a NaN has NaN for the factor of that
        chunk.
        """
        for_blocks(e, self.k, self.chunk, partial(self._prepare_chunk, e, x, prepared))

    def _prepare_chunk(self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int) -> None:
        b, order, vectors = e.b, self._order(), list[Value]()
        whole, factor = whole_numbers(e, bf16_values(e, x, k, self.chunk, valid, LANES))
        factors = e.offset(prepared, const(self._factors))
        e.store(factor, factors, b.udiv(k, const(self.chunk)), align=4)
        for start in range(0, self.chunk, len(order)):
            some = concat(e, whole[start // LANES : (start + len(order)) // LANES])
            some = b.trunc(some, vec(I16, len(order)))
            for at in range(0, len(order), WORDS):
                vector = b.shuffle_vector(some, some, lanes_mask(order[at : at + WORDS]))
                e.store(vector, prepared, b.add(k, const(start + at)), align=32)
                vectors.append(vector)
        if self.kind.least:
            self._prepare_starts(e, prepared, k, vectors)
        if self.kind.minima is None:
            return
        up, first = isplat(16, LANES), b.udiv(k, const(self.kind.summed))
        signed = [b.ashr(b.shl(each, up), up) for each in whole]
        for number, some in enumerate(in_groups(signed, self.kind.summed, b.add)):
            total = b.sitofp(e.reduce(some, b.add), F32)
            e.store(total, e.offset(prepared, const(self._sums)), b.add(first, const(number)))

    def _prepare_starts(self, e: Emitter, prepared: Value, k: Value, vectors: list[Value]) -> None:
        least = splat_int(I16, WORDS, self.kind.least & 0xFFFF)
        starts, each = e.offset(prepared, const(self._starts)), self._step // WORDS
        first = e.b.mul(e.b.udiv(k, const(self._step)), const(LANES))
        for number in range(len(vectors) // each):
            total: Value = e.zeros(I32, LANES)
            for vector in vectors[number * each : (number + 1) * each]:
                total = multiply_words(e, total, least, vector)
            e.store(total, starts, e.b.add(first, const(number * LANES)), align=64)

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Behind the vectors of a step what its sum starts from."""
        found = super().activations(e, prepared, k, step)
        if step == self.kind.steps:
            return found
        if not self.kind.least:
            return [*found, e.zeros(I32, LANES)]
        index = e.b.add(e.b.mul(e.b.udiv(k, const(self._step)), const(LANES)), const(LANES * step))
        starts = e.offset(prepared, const(self._starts))
        return [*found, e.load_vec(starts, index, I32, LANES, align=64)]

    def _sum(self, e: Emitter, words: list[Value], activations: list[Value]) -> Value:
        *vectors, found = activations
        for word, vector in zip(words, vectors, strict=True):
            found = multiply_words(e, found, word, vector)
        return e.b.sitofp(found, vec(F32, LANES))

    def value(
        self, e: Emitter, total: Value, prepared: Value, k: Value, zero: Value | None = None
    ) -> Value:
        """The finished sum of the chunk at element `k` in f32."""
        factors = e.offset(prepared, const(self._factors))
        factor = e.load(factors, e.b.udiv(k, const(self.chunk)), F32)
        return e.b.fmul(total, e.splat(factor, LANES))
