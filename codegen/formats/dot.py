"""Dot products of stored weight rows with prepared activations, one form per weight format and
tier.

A form takes a row in chunks of `chunk` weights. A chunk is a few vectors of decoded weights,
multiplied into an accumulator with as many vectors of activations; formats with scales sum a chunk
by itself and add it, scaled, to the total. Hidden here: how codes become numbers, and the order in
which activations must lie for that (`prepare` brings them into it once a call, so that weights
never move between lanes).

    tiers            fp8                      bf16       int4                   fp16, f32
    with pair_dot    byte tables, vdpbf16ps   vdpbf16ps  word table, vdpbf16ps  f32 multiply-add
                     (pairs.py)                          (pairs.py)
    without          to f32 in place, f32 multiply-add   whole numbers          f32 multiply-add
                     (unpack.py)                         (whole.py)

Blocks of GGUF are multiplied as pairs too (block_dot.py). Any other format is decoded with its
scales and multiplied as f32 (made.py, native.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from llvmlite import ir

from hmc.codegen.formats.pairs import fp8_byte, fp8_sign, fp8_words, int4_words
from hmc.codegen.formats.planes import Beside, Row, addresses, planes_of
from hmc.codegen.formats.unpack import (
    FP8_ACTIVATIONS,
    FP8_RESULT,
    bf16_vectors,
    fp8_vectors,
    order,
    unit_of,
)
from hmc.codegen.formats.weights import Scales, row_bytes, scales_of, span_bytes, weights_f32
from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, const, fconst, lanes_mask, vec
from hmc.codegen.native import arithmetic, reads_planes
from hmc.codegen.spec import FP8_BLOCK, KernelSpec
from hmc.codegen.vector import (
    bf16_bits,
    concat,
    dot_pairs,
    fsplat,
    masked_vec,
    splat_int,
    unpack_order,
)


@dataclass(frozen=True)
class Dot:
    """The form for one spec's rows of `k` weights; all counts are compile-time."""

    spec: KernelSpec
    k: int

    @property
    def lanes(self) -> int:
        """f32 lanes of an accumulator."""
        return self.spec.tier.lanes

    @property
    def registers(self) -> int:
        """Vector registers of the tier."""
        return self.spec.tier.registers

    @property
    def paired(self) -> bool:
        """Whether products are of bf16 pairs (`vdpbf16ps`), else of f32."""
        return reads_planes(self.spec) and arithmetic(self.spec.isa, self.spec.weight) == "bf16"

    @property
    def width(self) -> int:
        """Weights in one vector of decoded weights."""
        return 32 if self.paired else self.lanes

    @property
    def chunk(self) -> int:
        """Weights a step."""
        if self.spec.weight == "fp8":
            return FP8_BLOCK
        return self.unit if self.scaled else 4 * self.width

    @cached_property
    def scales(self) -> Scales:
        """The scales of sums of codes."""
        return scales_of(self.spec)

    @cached_property
    def planes(self) -> tuple[Beside, ...]:
        """What lies beside the codes."""
        return planes_of(self.spec)

    @property
    def row_bytes(self) -> int:
        """Bytes from one stored row to the next."""
        return row_bytes(self.spec.weight, self.k)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the weights of one step."""
        return span_bytes(self.spec.weight, self.chunk)

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one row of prepared activations, padded with zeros to whole chunks; a multiple
        of 64.
        """
        padded = -(-self.k // self.chunk) * self.chunk
        return -(-padded * (2 if self.paired else 4) // 64) * 64

    # -- activations -------------------------------------------------------------------------------

    def prepare(self, e: Emitter, x: Value, prepared: Value) -> None:
        """Write the bf16 row at `x` to the 64-byte aligned `prepared` in the form's order and
        format.
        """
        unit = len(self._order())
        whole = self.k // unit * unit
        with e.for_range(0, whole, unit) as k:
            self._prepare_unit(e, x, prepared, k, unit)
        padded = -(-self.k // self.chunk) * self.chunk
        for k in range(whole, padded, unit):
            self._prepare_unit(e, x, prepared, const(k), self.k - k)

    def _order(self) -> list[int]:
        """Where lane i of the prepared activations comes from, for one unit of them."""
        if not self.paired:
            return order(self.spec.weight, self.lanes)
        if self.spec.weight == "fp8":
            return unpack_order(64, 0)[::2] + unpack_order(64, 1)[::2]
        if self.spec.weight == "int4":
            return [4 * word + nibble for nibble in range(4) for word in range(32)]
        return list(range(32))

    def _prepare_unit(self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int) -> None:
        b, order = e.b, self._order()
        joined = concat(e, list(bf16_bits(e, x, k, len(order), valid, self.width)))
        for start in range(0, len(order), self.width):
            lanes = [ir.Constant(I32, lane) for lane in order[start : start + self.width]]
            vector = b.shuffle_vector(
                joined,
                ir.Constant(joined.type, ir.Undefined),
                ir.Constant(vec(I32, len(lanes)), lanes),
            )
            if not self.paired:
                vector = e.bf16_to_f32(vector)
                if self.spec.weight == "fp8":
                    vector = b.fmul(vector, fsplat(FP8_ACTIVATIONS, self.lanes))
            e.store(vector, prepared, b.add(k, const(start)), align=32)

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Vector `step` of the unit at element `k`, to go with `decode(...)[step]`."""
        index = e.b.add(k, const(step * self.width))
        if self.paired:
            return e.load_vec(prepared, index, I16, self.width, align=64)
        return e.load_vec(prepared, index, F32, self.width, align=32)

    # -- weights -----------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """Weights decoded together: one vector's worth of bytes (fp16: one vector of f32)."""
        if self.paired:
            return {"fp8": 64, "bf16": 32, "int4": 128}[self.spec.weight]
        return unit_of(self.spec.weight, self.lanes)

    def row(self, e: Emitter, matrix: tuple[Value, Value], number: Value) -> Row:
        """Row `number` of a matrix (weights, what lies beside them)."""
        codes = e.offset(matrix[0], e.b.mul(number, const(self.row_bytes)))
        bases = addresses(e, self.planes, matrix[1])
        planes = (
            plane.row(e, base, number, self.k)
            for plane, base in zip(self.planes, bases, strict=True)
        )
        return Row(codes, tuple(planes))

    def load(self, e: Emitter, row: Row, k: Value, valid: int) -> Value:
        """The unit at element `k` of a row as it is stored, of which `valid` weights are read;
        behind them are zeros. Where there is no native decoder, it is decoded already.
        """
        weight, b = self.spec.weight if reads_planes(self.spec) else "", e.b
        if weight == "fp8":
            return masked_vec(e, row.codes, k, I8, self.unit, valid)
        if weight == "bf16":
            return masked_vec(e, row.codes, k, I16, self.unit, valid)
        if weight == "int4":
            return masked_vec(e, row.codes, b.lshr(k, const(2)), I16, 32, -(-valid // 4))
        return weights_f32(e, self.spec, row, k, min(valid, self.lanes))[0]

    def decode(self, e: Emitter, codes: Value, tokens: int = 1) -> list[Value]:
        """The vectors of weights of what `load` loaded, to be multiplied by `tokens` rows."""
        weight = self.spec.weight
        if self.paired:
            if weight == "int4":
                shifts = (splat_int(I16, 32, shift) for shift in (4, 8, 12))
                nibbles = [codes, *(e.b.lshr(codes, shift) for shift in shifts)]
                return [int4_words(e, words) for words in nibbles]
            if weight == "bf16":
                return [codes]
            top = e.b.or_(fp8_byte(e, codes, 8), fp8_sign(e, codes))
            return fp8_words(e, top, fp8_byte(e, codes, 0))
        if weight == "fp8":
            return fp8_vectors(e, codes, multiply=tokens == 1)
        return bf16_vectors(e, codes) if weight == "bf16" else [codes]

    def start(self, e: Emitter, prepared: Value, k: Value) -> Value:
        """What the sum of the chunk at element `k` starts from, where chunks are `scaled`."""
        return e.zeros(F32, self.lanes)

    def value(self, e: Emitter, total: Value, prepared: Value, k: Value) -> Value:
        """The finished sum of the chunk at element `k` in f32, without its weights' scales."""
        return total

    def multiply(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """`total` + weights * activations, lane by lane (pair by pair)."""
        if not self.paired:
            return e.fma(weights, activations, total)
        return dot_pairs(e, total, weights, activations)

    # -- scales ------------------------------------------------------------------------------------

    @property
    def scaled(self) -> bool:
        """Whether chunks have scales."""
        return self.scales.columns > 0

    def scale(self, e: Emitter, row: Row, k: Value, valid: int) -> Value:
        """Factor of each accumulator lane for the chunk at element `k` of `row`."""
        b, (scales,) = e.b, row.planes
        per = self.scales.columns
        count = max(1, self.chunk // per)
        valid_groups = -(-min(valid, self.chunk) // per)
        index = b.udiv(k, const(per))
        if self.scales.bytes == 4:
            if count == 1:
                one = e.load(scales, index, F32)
                if self.spec.weight == "fp8" and not self.paired:
                    one = b.fmul(one, fconst(FP8_RESULT))
                return e.splat(one, self.lanes)
            few = masked_vec(e, scales, index, F32, count, valid_groups)
        elif count == 1 and self.lanes == 16:
            return e.splat(e.bf16_to_f32(e.load(scales, index, I16)), self.lanes)
        elif count == 1:  # in vector registers: a way through the others takes as long as a unit
            words = e.splat(e.load(scales, index, I16), 2 * self.lanes)
            upper = b.shl(b.bitcast(words, vec(I32, self.lanes)), splat_int(I32, self.lanes, 16))
            return b.bitcast(upper, vec(F32, self.lanes))
        elif self.lanes == 16:
            return self._spread(e, masked_vec(e, scales, index, I16, count, valid_groups))
        else:
            few = e.bf16_to_f32(masked_vec(e, scales, index, I16, count, valid_groups))
        spread = lanes_mask([lane * count // self.lanes for lane in range(self.lanes)])
        return b.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), spread)

    def _spread(self, e: Emitter, few: Value) -> Value:
        """bf16 scales `<2 or 4 x i16>` to the f32 lanes that they belong to: one broadcast load,
        one byte shuffle.
        """
        b, count = e.b, few.type.count
        copies = b.bitcast(
            e.splat(b.bitcast(few, ir.IntType(16 * count)), 32 // count), vec(I16, 32)
        )
        words = [word for lane in range(16) for word in (32, lane // 4 * 8 + lane * count // 16)]
        return b.bitcast(
            b.shuffle_vector(copies, e.zeros(I16, 32), lanes_mask(words)), vec(F32, 16)
        )
