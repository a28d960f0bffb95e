"""Micro-kernels of the many-token matmul: what a register tile multiplies, and how weights and
tokens are brought into that shape. One class a form; `micro_of` chooses once, by format and tier.

    Pairs          bf16 pairs by `vdpbf16ps`, for formats whose weights bf16 holds exactly, on tiers
                   with `pair_dot`; sums of a scale group go, scaled, into f32 totals: one
                   multiply-add for 16 to 64 dot products
    WholeNumbers   int4 on the other tiers: i16 pairs by `vpmaddwd`; tokens are rounded to whole
                   numbers chunk by chunk (whole.py), sums are exact, and go times the token's
                   factor and the scales into f32 totals
    Fp8InPlace     fp8 on the other tiers: to f32 by shifts and masks in place (unpack.py) after the
                   rows are interleaved; its scales go in with that, so there is one sum a chunk
    Floats         f32 multiply-add; formats without scales, and all that have no other, whose
                   weights come with their scales
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import ClassVar

from hmc.codegen.formats.interleave import (
    Chunk,
    decode_codes,
    decode_columns,
    decode_pairs,
    decode_words,
)
from hmc.codegen.formats.unpack import FP8_ACTIVATIONS, FP8_RESULT
from hmc.codegen.formats.whole import bf16_values, multiply_words, whole_numbers
from hmc.codegen.ir import F32, I16, I32, Emitter, Value, vec
from hmc.codegen.native import arithmetic, reads_planes
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import bf16_bits, dot_pairs, fsplat

Vectors = Iterator[tuple[Value, int]]
"""Vectors of a token's share of a chunk, each with the byte of the share that it starts at."""


@dataclass(frozen=True)
class MicroKernel:
    """Multiplies `step` weights of a row at once, in `lanes` rows. `scales_sums`: sums of a group
    are scaled, not the weights; `token_factors`: so are the chunks of tokens, by `finish`.
    """

    spec: KernelSpec
    step: ClassVar[int] = 1
    scales_sums: ClassVar[bool] = False
    token_factors: ClassVar[bool] = False

    @property
    def lanes(self) -> int:
        """Rows of a vector."""
        return self.spec.tier.lanes

    def pack(
        self, e: Emitter, row: Value, k: Value, valid: int, size: int, factor: Value
    ) -> Vectors:
        """`size` activations of the bf16 `row` from `k` on, zeros past `valid`; what the chunk's
        sums are multiplied by goes to `factor` (f32*), where there are `token_factors`.
        """
        for number, bits in enumerate(bf16_bits(e, row, k, size, valid, self.lanes)):
            yield self._activation(e, bits), number * self.lanes * 4 // self.step

    def _activation(self, e: Emitter, bits: Value) -> Value:
        return e.bf16_to_f32(bits)

    def decode(self, e: Emitter, chunk: Chunk, scale: Callable[[], Value]) -> None:
        """Weights to the panel; `scale()` is each row's scale of them."""
        decode_columns(e, self.spec, chunk)

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

    def decode(self, e: Emitter, chunk: Chunk, scale: Callable[[], Value]) -> None:
        """Scaled weights."""
        factor = e.b.fmul(scale(), fsplat(FP8_RESULT, self.lanes))
        decode_codes(e, chunk, factor)


class Pairs(MicroKernel):
    """bf16 pairs."""

    step = 2
    scales_sums = True

    def _activation(self, e: Emitter, bits: Value) -> Value:
        return bits

    def decode(self, e: Emitter, chunk: Chunk, scale: Callable[[], Value]) -> None:
        """Pairs of bf16, a word each."""
        decode_pairs(e, self.spec.weight, chunk)

    def multiply_add(self, e: Emitter, weights: Value, one: Value, total: Value) -> Value:
        """Two products a lane."""
        return dot_pairs(e, total, weights, one)


class WholeNumbers(MicroKernel):
    """i16 pairs, summed in i32."""

    step = 2
    scales_sums = True
    token_factors = True

    def pack(
        self, e: Emitter, row: Value, k: Value, valid: int, size: int, factor: Value
    ) -> Vectors:
        """Whole numbers, and the factor that makes activations of them."""
        values = bf16_values(e, row, k, size, valid, self.lanes)
        whole, scale = whole_numbers(e, values)
        e.b.store(scale, factor)
        for number, value in enumerate(whole):
            yield e.b.trunc(value, vec(I16, self.lanes)), 2 * number * self.lanes

    def decode(self, e: Emitter, chunk: Chunk, scale: Callable[[], Value]) -> None:
        """Pairs of i16, a word each."""
        decode_words(e, chunk)

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


def micro_of(spec: KernelSpec) -> MicroKernel:
    """The micro-kernel for the format and the tier of `spec`."""
    if not reads_planes(spec):
        return Floats(spec)
    kind, weight = arithmetic(spec.isa, spec.weight), spec.weight
    native = {("bf16", weight): Pairs, ("whole", weight): WholeNumbers, ("f32", "fp8"): Fp8InPlace}
    return native.get((kind, weight), Floats)(spec)
