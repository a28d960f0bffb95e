"""Dot products in whole numbers, for tiers without `vdpbf16ps`: 16-bit activations and `vpmaddwd`.

A chunk's activations are rounded to multiples of their largest / 32767, which is below the rounding
to bf16 that they have been through: at most 2^-16 of the largest against up to 2^-9 of itself.
Products and sums of a chunk are then exact, whatever their order. Codes of 4 bits are taken as they
are, 0 to 15, by a shift and a mask; that they mean less (8) is the same for every row, so sums
start from that times the sum of the activations, which `prepare` has ready (words.py). Where zeros
are taken off, they go times that sum when the chunk's sum is f32.

A 16-bit word holds 4 nibbles, so vector j of the decoded weights holds nibble j of every word, and
a lane of the sums belongs to one stored int32 word: 8 neighbouring weights, of one scale. Of bytes
a lane belongs to two neighbours in every vector, which are all of one scale.

A prepared row: i16 activations, padded with zeros to whole chunks; of each chunk the i32 lanes that
its sums start from (f32 sums of activations, where there are zeros); of each chunk the f32 that its
sums are multiplied by.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from hmc.codegen.formats.dot import CHUNK, Dot
from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.words import WordCodes, word_codes
from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const, fconst, lanes_mask, vec
from hmc.codegen.vector import (
    bf16_bits,
    concat,
    cut,
    fmax,
    for_blocks,
    fsplat,
    isplat,
    splat_int,
)

LARGEST = 32767.0
_SMALLEST = 1e-30  # a chunk's largest counts as no less, so that its reciprocal is finite
_ROUND = 1.5 * 2.0**23  # added, it leaves round(x) in the low bits
_ADDED = "llvm.x86.avx512.vpdpwssd.512"
_BYTES_ADDED = "llvm.x86.avx512.vpdpbusd.512"
_MULTIPLY = {8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}


@dataclass(frozen=True)
class WholeDot(Dot):
    """`Dot` in whole numbers."""

    @cached_property
    def words(self) -> WordCodes:
        """How codes become whole numbers."""
        return word_codes(self.format, self.lanes)

    @property
    def width(self) -> int:
        """Weights in one vector of decoded weights, and activations in one of prepared ones."""
        return 2 * self.lanes

    @property
    def unit(self) -> int:
        """Weights decoded together: those of one vector's worth of bytes."""
        return self.words.steps * self.width

    @property
    def chunk(self) -> int:
        """Weights a step: whole units, and whole groups of a scale."""
        return max(self.unit, min([CHUNK, *(plane.columns for plane in self.inner)]))

    @property
    def scaled(self) -> bool:
        """Chunks have factors of their own."""
        return True

    @property
    def _starts(self) -> int:
        """Byte offset of the lanes that sums start from."""
        return self._chunks * self.chunk * 2

    @property
    def _factors(self) -> int:
        """Byte offset of what sums are multiplied by."""
        return self._starts + self._chunks * self.lanes * 4

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one prepared row, a multiple of 64."""
        return -(-(self._factors + self._chunks * 4) // 64) * 64

    # -- activations -------------------------------------------------------------------------------

    def prepare(self, e: Emitter, x: Value, prepared: Value) -> None:
        """Write the bf16 row at `x` to the 64-byte aligned `prepared`. A row with an infinity or a
        NaN has NaN for the factor of that chunk.
        """
        for_blocks(e, self.k, self.chunk, partial(self._prepare_chunk, e, x, prepared))

    def _prepare_chunk(self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int) -> None:
        b, lanes = e.b, self.lanes
        values = bf16_values(e, x, k, self.chunk, valid, lanes)
        whole, factor = whole_numbers(e, values)
        if self.words.factor != 1.0:
            factor = b.fmul(factor, fconst(self.words.factor))
        chunk = b.udiv(k, const(self.chunk))
        e.store(factor, e.offset(prepared, const(self._factors)), chunk, align=4)
        total, order = e.zeros(I32, lanes), self.words.order
        each = splat_int(I16, self.width, 1 if self.zeros else self.words.least & 0xFFFF)
        for start in range(0, self.chunk, self.unit):
            words = concat(e, whole[start // lanes : (start + self.unit) // lanes])
            words = b.trunc(words, vec(I16, self.unit))
            for at in range(0, self.unit, self.width):
                vector = b.shuffle_vector(words, words, lanes_mask(order[at : at + self.width]))
                e.store(vector, prepared, b.add(k, const(start + at)), align=2 * self.width)
                total = self.multiply(e, total, each, vector)
        if self.zeros:
            total = b.sitofp(total, vec(F32, lanes))
        starts = e.offset(prepared, const(self._starts))
        e.store(total, starts, b.mul(chunk, const(lanes)), align=4 * lanes)

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Vector `step` of the unit at element `k`, to go with `decode(...)[step]`."""
        index = e.b.add(k, const(step * self.width))
        return e.load_vec(prepared, index, I16, self.width, align=2 * self.width)

    # -- weights -----------------------------------------------------------------------------------

    def load(self, e: Emitter, row: Row, k: Value, valid: int) -> Value:
        """The unit at element `k` as it is stored; zeros behind `valid` weights."""
        return self.words.load(e, row.codes, k, valid)

    def decode(self, e: Emitter, codes: Value, tokens: int = 1) -> list[Value]:
        """Vectors `<width x i16>`."""
        return self.words.decode(e, codes)

    def start(self, e: Emitter, prepared: Value, k: Value, zero: Value | None = None) -> Value:
        """What the sum of the chunk at element `k` starts from."""
        return e.zeros(I32, self.lanes) if zero is not None else self._start(e, prepared, k, I32)

    def _start(self, e: Emitter, prepared: Value, k: Value, kind: Any) -> Value:
        starts = e.offset(prepared, const(self._starts))
        index = e.b.mul(e.b.udiv(k, const(self.chunk)), const(self.lanes))
        return e.load_vec(starts, index, kind, self.lanes, align=4 * self.lanes)

    def multiply(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """`total` and, lane by lane, two products: i32."""
        return multiply_words(e, total, weights, activations)

    def value(
        self, e: Emitter, total: Value, prepared: Value, k: Value, zero: Value | None = None
    ) -> Value:
        """The finished sum of the chunk at element `k` in f32, without its weights' scales."""
        factors = e.offset(prepared, const(self._factors))
        factor = e.load(factors, e.b.udiv(k, const(self.chunk)), F32)
        value = e.b.sitofp(total, vec(F32, self.lanes))
        if zero is not None:
            value = e.fma(self._start(e, prepared, k, F32), zero, value)
        return e.b.fmul(value, e.splat(factor, self.lanes))


def bf16_values(e: Emitter, x: Value, k: Value, count: int, valid: int, lanes: int) -> list[Value]:
    """`count` elements of the bf16 row at `x` from `k` on, in f32 vectors; zeros past `valid`."""
    return [e.bf16_to_f32(bits) for bits in bf16_bits(e, x, k, count, valid, lanes)]


def whole_numbers(
    e: Emitter, values: list[Value], most_of_one: float = LARGEST
) -> tuple[list[Value], Value]:
    """f32 vectors of a chunk as whole numbers, `most_of_one` at most and none below its negative
    (in the low 16 bits of i32 lanes; those above are anything), and the f32 they must be multiplied
    by: NaN where a value is not finite.
    """
    b, lanes = e.b, values[0].type.count
    largest = spoilt = e.zeros(F32, lanes)
    for value in values:
        bits = b.and_(b.bitcast(value, vec(I32, lanes)), isplat(0x7FFFFFFF, lanes))
        largest = fmax(e, b.bitcast(bits, value.type), largest)
        spoilt = e.fma(value, e.zeros(F32, lanes), spoilt)
    most = e.reduce(largest, partial(fmax, e))
    most = b.select(b.fcmp_ordered(">", most, fconst(_SMALLEST)), most, fconst(_SMALLEST))
    factor = b.fadd(b.fdiv(most, fconst(most_of_one)), e.reduce_add(spoilt))
    scale = e.splat(b.fdiv(fconst(most_of_one), most), lanes)
    magic = fsplat(_ROUND, lanes)
    whole = [b.bitcast(e.fma(value, scale, magic), vec(I32, lanes)) for value in values]
    return whole, factor


def multiply_words(e: Emitter, total: Value, left: Value, right: Value) -> Value:
    """`total` `<n x i32>` + the sums of two products of neighbours of `left`, `right` `<2n x i16>`
    (`vpmaddwd`, or `vpdpwssd` where there is one), in vectors of the tier.
    """
    count, lanes = total.type.count, e.lanes
    if count > lanes:
        parts = (cut(e, total, lanes), cut(e, left, 2 * lanes), cut(e, right, 2 * lanes))
        return concat(e, [multiply_words(e, *each) for each in zip(*parts, strict=True)])
    if e.spec.tier.whole_dot and count == lanes:
        return e.call(
            _ADDED, total.type, total, *(e.b.bitcast(x, total.type) for x in (left, right))
        )
    return e.b.add(total, e.call(_MULTIPLY[count], total.type, left, right))


def add_bytes(e: Emitter, total: Value, left: Value, right: Value) -> Value:
    """`total` `<16 x i32>` + the sums of four products of neighbouring bytes of `left`, not
    negative, and `right`, signed (both `<32 x i16>`; `vpdpbusd`), on tiers with `whole_dot`.
    """
    words = (e.b.bitcast(x, total.type) for x in (left, right))
    return e.call(_BYTES_ADDED, total.type, total, *words)
