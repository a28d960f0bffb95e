"""Dot products of stored weight rows with prepared activations, one form per arithmetic and width
of code.

A form takes a row in chunks of `chunk` weights. A chunk is a few vectors of decoded weights,
multiplied into an accumulator with as many vectors of activations; formats with scales for columns
sum a chunk by itself and add it, scaled, to the total; scales of whole rows are multiplied in at
the end. Hidden here: how codes become numbers, and the order in which activations must lie for that
(`prepare` brings them into it once a call, so that weights never move between lanes).

    tiers            8 bits                   bf16       4 bits                 fp16, f32
    with pair_dot    byte tables, vdpbf16ps   vdpbf16ps  word table, vdpbf16ps  f32 multiply-add
                     (pairs.py)                          (pairs.py)
    without          E4M3: to f32 in place, f32          whole numbers          f32 multiply-add
                     multiply-add (unpack.py)            (whole.py)

Zeros: sums of codes are less by the zero times the sum of the activations, which `prepare` adds up
chunk by chunk, for each lane of an accumulator.

Blocks of GGUF have forms of their own (block_dot.py). Any other format is decoded
with its scales and multiplied as f32 (made.py, native.py).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, partial

from llvmlite import ir

from hmc.codegen.formats.lanes import over_lanes
from hmc.codegen.formats.pairs import PairCodes, middle_of, pair_codes
from hmc.codegen.formats.planes import ALL, Beside, Row, addresses, planes_of
from hmc.codegen.formats.unpack import (
    FP8_ACTIVATIONS,
    FP8_RESULT,
    bf16_vectors,
    fp8_vectors,
    order,
    steps_of,
)
from hmc.codegen.formats.weights import row_bytes, span_bytes, weights_f32
from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, const, fconst, vec
from hmc.codegen.native import arithmetic, is_e4m3, is_native
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import (
    bf16_bits,
    concat,
    dot_pairs,
    for_blocks,
    fsplat,
    masked_vec,
    splat_int,
)
from hmc.formats import Format, format_of

_ONE_BF16 = 0x3F80

CHUNK = 128
"""Most weights of a sum that is scaled by itself."""


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

    @cached_property
    def native(self) -> bool:
        """Whether codes come without what lies beside them."""
        return is_native(self.spec)

    @cached_property
    def format(self) -> Format:
        """The row of its weights."""
        return format_of(self.spec.weight)

    @cached_property
    def pairs(self) -> PairCodes | None:
        """How codes become pairs of bf16, where these are multiplied (`vdpbf16ps`), else f32."""
        if self.native and arithmetic(self.spec.isa, self.spec.weight) == "bf16":
            return pair_codes(self.format)
        return None

    @property
    def paired(self) -> bool:
        """Whether products are of bf16 pairs."""
        return self.pairs is not None

    @property
    def shifted(self) -> bool:
        """Whether E4M3 codes become f32 of another exponent in place (unpack.py)."""
        return self.native and is_e4m3(self.format) and not self.pairs

    @property
    def width(self) -> int:
        """Weights in one vector of decoded weights."""
        return 32 if self.paired else self.lanes

    @property
    def chunk(self) -> int:
        """Weights a step: those of a scale where a sum of them has one, but whole units."""
        if not self.scaled:
            return max(4 * self.width, self.unit)
        return max(self.unit, min(CHUNK, *(plane.columns for plane in self.inner)))

    @cached_property
    def planes(self) -> tuple[Beside, ...]:
        """What lies beside the codes."""
        return planes_of(self.spec)

    @cached_property
    def inner(self) -> tuple[Beside, ...]:
        """What sums of a chunk are less and multiplied by."""
        planes = self.planes if self.native else ()
        return tuple(each for each in planes if each.kind != "order" and each.columns < ALL)

    @property
    def zeros(self) -> bool:
        """Whether zeros are taken off."""
        return any(plane.kind == "zero" for plane in self.inner)

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
        sums = self._chunks * self.lanes * 4 if self.zeros else 0
        return -(-(self._sums + sums) // 64) * 64

    @property
    def _chunks(self) -> int:
        return -(-self.k // self.chunk)

    @property
    def _sums(self) -> int:
        """Byte offset of the sums of activations, a vector a chunk."""
        return self._chunks * self.chunk * (2 if self.pairs else 4)

    # -- activations -------------------------------------------------------------------------------

    def prepare(self, e: Emitter, x: Value, prepared: Value) -> None:
        """Write the bf16 row at `x` to the 64-byte aligned `prepared` in the form's order and
        format.
        """
        if self.zeros:
            for_blocks(e, self.k, self.chunk, partial(self._prepare_chunk, e, x, prepared))
            return
        unit = len(self._order())
        whole = self.k // unit * unit
        with e.for_range(0, whole, unit) as k:
            self._prepare_unit(e, x, prepared, k, unit)
        for k in range(whole, self._chunks * self.chunk, unit):
            self._prepare_unit(e, x, prepared, const(k), self.k - k)

    def _prepare_chunk(self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int) -> None:
        """And the sums of its activations."""
        total, ones = e.zeros(F32, self.lanes), splat_int(I16, self.width, _ONE_BF16)
        for start in range(0, self.chunk, self.unit):
            place = e.b.add(k, const(start))
            for vector in self._prepare_unit(e, x, prepared, place, valid - start):
                total = dot_pairs(e, total, ones, vector)
        index = e.b.mul(e.b.udiv(k, const(self.chunk)), const(self.lanes))
        e.store(total, e.offset(prepared, const(self._sums)), index, align=4 * self.lanes)

    def _order(self) -> list[int]:
        """Where lane i of the prepared activations comes from, for one unit of them."""
        if self.pairs:
            return self.pairs.order
        return order(self._steps, self.lanes)

    @property
    def _steps(self) -> int:
        """Vectors of f32 from one of codes."""
        return self.unit // self.lanes

    def _prepare_unit(
        self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int
    ) -> list[Value]:
        b, order, found = e.b, self._order(), []
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
                if self.shifted:
                    vector = b.fmul(vector, fsplat(FP8_ACTIVATIONS, self.lanes))
            e.store(vector, prepared, b.add(k, const(start)), align=32)
            found.append(vector)
        return found

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Vector `step` of the unit at element `k`, to go with `decode(...)[step]`."""
        index = e.b.add(k, const(step * self.width))
        if self.pairs:
            return e.load_vec(prepared, index, I16, self.width, align=64)
        return e.load_vec(prepared, index, F32, self.width, align=32)

    # -- weights -----------------------------------------------------------------------------------

    @property
    def unit(self) -> int:
        """Weights decoded together: one vector's worth of bytes (fp16: one vector of f32)."""
        if self.pairs:
            return self.pairs.unit
        return self.lanes * (steps_of(self.format) if self.native else 1)

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
        if self.pairs:
            return self.pairs.load(e, row.codes, k, valid)
        if self.unit > self.lanes:
            element = I8 if self.shifted else I16
            return masked_vec(e, row.codes, k, element, self.unit, valid)
        return weights_f32(e, self.spec, row, k, min(valid, self.lanes))[0]

    def decode(self, e: Emitter, codes: Value, tokens: int = 1) -> list[Value]:
        """The vectors of weights of what `load` loaded, to be multiplied by `tokens` rows."""
        if self.pairs:
            return self.pairs.decode(e, codes)
        if self.shifted:
            return fp8_vectors(e, codes, multiply=tokens == 1)
        return bf16_vectors(e, codes) if self.unit > self.lanes else [codes]

    def zero(self, e: Emitter, row: Row, k: Value, valid: int) -> Value | None:
        """What the codes of the chunk at element `k` of `row` are less by, for each lane of an
        accumulator, negative; None for formats without zeros.
        """
        for plane, base in zip(self.planes, row.planes, strict=True):
            if plane.kind == "zero" and self.zeros:
                middle = fsplat(middle_of(self.format) if self.pairs else 0.0, self.lanes)
                return e.b.fsub(middle, self._spread(e, plane, base, k, valid))
        return None

    def start(self, e: Emitter, prepared: Value, k: Value, zero: Value | None = None) -> Value:
        """What the sum of the chunk at element `k` starts from, where chunks are `scaled`."""
        if zero is None:
            return e.zeros(F32, self.lanes)
        index = e.b.mul(e.b.udiv(k, const(self.chunk)), const(self.lanes))
        sums = e.load_vec(e.offset(prepared, const(self._sums)), index, F32, self.lanes, align=64)
        return e.b.fmul(sums, zero)

    def value(
        self, e: Emitter, total: Value, prepared: Value, k: Value, zero: Value | None = None
    ) -> Value:
        """The finished sum of the chunk at element `k` in f32, without its weights' scales and the
        `token_factor`.
        """
        return total

    def token_factor(self, e: Emitter, prepared: Value, k: Value) -> Value | None:
        """What the chunk at element `k` is multiplied by where its weights have no scales; None
        for 1.
        """
        return None

    def multiply(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """`total` + weights * activations, lane by lane (pair by pair)."""
        if not self.pairs:
            return e.fma(weights, activations, total)
        return dot_pairs(e, total, weights, activations)

    # -- scales ------------------------------------------------------------------------------------

    @property
    def scaled(self) -> bool:
        """Whether chunks have scales."""
        return bool(self.inner)

    def scale(self, e: Emitter, row: Row, k: Value, valid: int) -> Value | None:
        """Factor of each accumulator lane for the chunk at element `k` of `row`; None for 1."""
        total: Value = None
        for plane, base in zip(self.planes, row.planes, strict=True):
            if plane.kind == "scale" and plane.columns < ALL:
                one = self._spread(e, plane, base, k, valid)
                total = one if total is None else e.b.fmul(total, one)
        return total

    def _spread(self, e: Emitter, plane: Beside, base: Value, k: Value, valid: int) -> Value:
        """The elements of a plane for the chunk at element `k`, over the lanes of its sums."""
        per = plane.columns
        count = max(1, self.chunk // per)
        index = e.b.udiv(k, const(per))
        if count == 1 and self.shifted and plane.dtype == "F32":
            one = e.b.fmul(e.load(base, index, F32), fconst(FP8_RESULT))
            return e.splat(one, self.lanes)
        found = over_lanes(e, plane, base, index, count, -(-min(valid, self.chunk) // per))
        return e.b.fmul(found, fsplat(FP8_RESULT, self.lanes)) if self.shifted else found

    def whole(self, e: Emitter, row: Row) -> Value | None:
        """Factor (f32) of the whole sum of `row`; None for 1."""
        total: Value = fconst(FP8_RESULT) if self.shifted and not self.scaled else None
        for plane, base in zip(self.planes, row.planes, strict=True):
            if self.native and plane.columns == ALL:
                one = plane.load(e, base, const(0))
                total = one if total is None else e.b.fmul(total, one)
        return total
