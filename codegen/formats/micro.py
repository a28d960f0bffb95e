"""Micro-kernels of the many-token matmul: what a register tile multiplies, and how weights and
tokens are brought into that shape. One class a form; forms.py chooses
once, by format and tier.

    Pairs          bf16 pairs by `vdpbf16ps`, for formats whose weights bf16 holds exactly, on tiers
                   with `pair_dot`; sums of a scale group go, scaled, into f32 totals: one
                   multiply-add for 16 to 64 dot products
    WholeNumbers   whole numbers on the others: i16 pairs by `vpmaddwd`; tokens are rounded to such
                   chunk by chunk (whole.py), sums are exact, and go times the token's
                   factor and the scales into f32 totals
    Fp8InPlace     E4M3 on the other tiers: to f32 by shifts and masks in place (unpack.py) after
                   the rows are interleaved; scales go in with that, so there is one sum a chunk
    Fp8Sums        the same where a chunk has several scales, which sums are multiplied by
    Floats         f32 multiply-add; formats without scales, and all that have no other, whose
                   weights come with their scales

Blocks of GGUF are brought into the first two forms too (block_micro.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from hmc.codegen.formats.interleave import (
    Chunk,
    Zeros,
    decode_codes,
    decode_columns,
    decode_pairs,
    decode_words,
)
from hmc.codegen.formats.pairs import middle_of, pair_codes
from hmc.codegen.formats.unpack import FP8_ACTIVATIONS, FP8_RESULT
from hmc.codegen.formats.whole import bf16_values, multiply_words, whole_numbers
from hmc.codegen.formats.words import WordCodes, word_codes
from hmc.codegen.ir import F32, I16, I32, Emitter, Value, fconst, vec
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import bf16_bits, dot_pairs, fsplat
from hmc.formats import format_of

Vectors = Iterator[tuple[Value, int]]
"""Vectors of a token's share of a chunk, each with the byte of the share that it starts at."""


@dataclass(frozen=True)
class MicroKernel:
    """Multiplies `step` weights of a row at once, in `lanes` rows. `scales_sums`: sums of a group
    are scaled, not the weights, by `result` besides; `token_factors`: so are the chunks of tokens,
    by `finish`.
    """

    spec: KernelSpec
    step: ClassVar[int] = 1
    scales_sums: ClassVar[bool] = False
    result: ClassVar[float] = 1.0

    @property
    def middle(self) -> float:
        """What decoded numbers are less than values where zeros are taken off."""
        return 0.0

    token_factors: ClassVar[bool] = False

    @property
    def group(self) -> int:
        """Columns of a scale that `scales` makes; 0 where scales are planes."""
        return 0

    @property
    def token_sums(self) -> int:
        """How many sums of activations of a chunk, of as many groups, go with `scales`' minima."""
        return 0

    @property
    def lanes(self) -> int:
        """Rows of a vector."""
        return self.spec.tier.lanes

    def pack(
        self, e: Emitter, row: Value, k: Value, valid: int, size: int, factor: Value
    ) -> Vectors:
        """`size` activations of the bf16 `row` from `k` on, zeros past `valid`; what the chunk's
        sums are multiplied by goes to `factor` (f32*), where there are `token_factors`, and behind
        it the `token_sums`.
        """
        for number, bits in enumerate(bf16_bits(e, row, k, size, valid, self.lanes)):
            yield self._activation(e, bits), number * self.lanes * 4 // self.step

    def _activation(self, e: Emitter, bits: Value) -> Value:
        return e.bf16_to_f32(bits)

    def decode(
        self, e: Emitter, chunk: Chunk, scale: Callable[[], Value], zeros: Zeros | None
    ) -> None:
        """Weights to the panel; `scale()` is each row's scale of them, `zeros` what they are less
        by.
        """
        decode_columns(e, self.spec, chunk)

    def scales(self, e: Emitter, chunk: Chunk) -> list[tuple[Value, Value | None]]:
        """What sums of each group are multiplied by, and what is added for the sum of its
        activations: a lane each row.
        """
        return []

    def zero(self, e: Emitter) -> Value:
        """What a sum starts from."""
        return e.zeros(F32, self.lanes)

    def multiply_add(self, e: Emitter, weights: Value, one: Value, total: Value) -> Value:
        """`total` + a step of `weights` x the word `one` in every lane; both come as f32."""
        return e.fma(weights, one, total)

    def finish(self, e: Emitter, total: Value, factor: Callable[[], Value]) -> Value:
        """A sum as f32; `factor()` is the token's, where there are `token_factors`."""
        return total


class Floats(MicroKernel):
    """f32 by f32."""


class Fp8InPlace(MicroKernel):
    """fp8 as f32 of another exponent, which activations and scales make up for."""

    def _activation(self, e: Emitter, bits: Value) -> Value:
        return e.b.fmul(e.bf16_to_f32(bits), fsplat(FP8_ACTIVATIONS, self.lanes))

    def decode(
        self, e: Emitter, chunk: Chunk, scale: Callable[[], Value], zeros: Zeros | None
    ) -> None:
        """Scaled weights."""
        factor = e.b.fmul(scale(), fsplat(FP8_RESULT, self.lanes))
        decode_codes(e, chunk, factor)


class Fp8Sums(Fp8InPlace):
    """The same, unscaled."""

    scales_sums = True
    result = FP8_RESULT

    def decode(
        self, e: Emitter, chunk: Chunk, scale: Callable[[], Value], zeros: Zeros | None
    ) -> None:
        """Weights x 2^-120."""
        decode_codes(e, chunk, None)


class Pairs(MicroKernel):
    """bf16 pairs."""

    step = 2
    scales_sums = True

    @property
    def middle(self) -> float:
        """What values are taken less by."""
        return middle_of(format_of(self.spec.weight))

    def _activation(self, e: Emitter, bits: Value) -> Value:
        return bits

    def decode(
        self, e: Emitter, chunk: Chunk, scale: Callable[[], Value], zeros: Zeros | None
    ) -> None:
        """Pairs of bf16, a word each."""
        decode_pairs(e, pair_codes(format_of(self.spec.weight)), chunk, zeros)

    def multiply_add(self, e: Emitter, weights: Value, one: Value, total: Value) -> Value:
        """Two products a lane."""
        return dot_pairs(e, total, weights, one)


class WholeNumbers(MicroKernel):
    """i16 pairs, summed in i32."""

    step = 2
    scales_sums = True
    token_factors = True

    @property
    def _codes(self) -> WordCodes:
        return word_codes(format_of(self.spec.weight), self.lanes)

    def pack(
        self, e: Emitter, row: Value, k: Value, valid: int, size: int, factor: Value
    ) -> Vectors:
        """Whole numbers, and the factor that makes activations of them."""
        values = bf16_values(e, row, k, size, valid, self.lanes)
        whole, scale = whole_numbers(e, values)
        if self._codes.factor != 1.0:
            scale = e.b.fmul(scale, fconst(self._codes.factor))
        e.b.store(scale, factor)
        self._sum(e, whole, scale, factor)
        for number, value in enumerate(whole):
            word = e.b.trunc(value, vec(I16, self.lanes))
            yield self._activation(e, word), 2 * number * self.lanes

    def _activation(self, e: Emitter, bits: Value) -> Value:
        return bits

    def _sum(self, e: Emitter, whole: list[Value], scale: Value, factor: Value) -> None:
        """Store sums of activations, whole numbers times `scale`, behind `factor`."""

    def decode(
        self, e: Emitter, chunk: Chunk, scale: Callable[[], Value], zeros: Zeros | None
    ) -> None:
        """Pairs of i16, a word each."""
        decode_words(e, self._codes, chunk, zeros)

    def zero(self, e: Emitter) -> Value:
        """i32."""
        return e.zeros(I32, self.lanes)

    def multiply_add(self, e: Emitter, weights: Value, one: Value, total: Value) -> Value:
        """Two products a lane."""
        words = (e.b.bitcast(value, vec(I16, 2 * self.lanes)) for value in (weights, one))
        return e.another(multiply_words(e, total, *words))

    def finish(self, e: Emitter, total: Value, factor: Callable[[], Value]) -> Value:
        """The sum times the token's factor."""
        times = e.splat(factor(), self.lanes)
        return e.b.fmul(e.b.sitofp(total, times.type), times)
