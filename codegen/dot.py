"""Dot products of stored weight rows with prepared activations, one form per weight format and tier.

A form takes a row in chunks of `chunk` weights. A chunk is a few vectors of decoded weights, multiplied into an
accumulator with as many vectors of activations; formats with scales sum a chunk by itself and add it, scaled, to the
total. Hidden here: how codes become numbers, and the order in which activations must lie for that (`prepare` brings
them into it once a call, so that weights never move between lanes).

    tier          fp8                                     bf16          int4                       fp16, f32
    avx512_bf16   byte tables (vpermi2b), vdpbf16ps       vdpbf16ps     word table, vdpbf16ps      f32 multiply-add
    avx512, avx2  through FP16, f32 multiply-add          f32 multiply-add everywhere

The byte tables: high and low byte of the BF16 value of an E4M3 code are functions of its 7 magnitude bits, which is
just the index that `vpermi2b` takes; subnormals and NaN are entries like the others. Interleaving high and low bytes
orders the words by 128-bit lane, and so are the activations. int4: `vpermw` looks at 5 bits of each 16-bit word, so a
table that repeats after 16 entries decodes the lowest of its 4 nibbles, three shifts bring the others.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from llvmlite import ir

from hmc.codegen.ir import BF16, F32, I8, I16, I32, Emitter, Value, const, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import FP8_BLOCK, KernelSpec
from hmc.codegen.weights import masked_vec, row_bytes, splat_int, weights_f32


@dataclass(frozen=True)
class Dot:
    """The form for one spec's rows of `k` weights; all counts are compile-time."""

    spec: KernelSpec
    k: int

    @property
    def lanes(self) -> int:
        """f32 lanes of an accumulator."""
        return TIERS[self.spec.isa].lanes

    @property
    def paired(self) -> bool:
        """Whether products are of bf16 pairs (`vdpbf16ps`), else of f32."""
        return self.spec.isa == "avx512_bf16" and self.spec.weight in ("fp8", "bf16", "int4")

    @property
    def width(self) -> int:
        """Weights in one vector of decoded weights."""
        return 32 if self.paired else self.lanes

    @property
    def chunk(self) -> int:
        """Weights a step."""
        if self.spec.weight == "fp8":
            return FP8_BLOCK
        if self.spec.weight == "int4":
            return 128 if self.paired else self.group
        return 4 * self.width

    @property
    def group(self) -> int:
        """int4 weights that share a scale."""
        group = self.spec["group"]
        assert group in (32, 64, 128), group
        return group

    @property
    def row_bytes(self) -> int:
        """Bytes from one stored row to the next."""
        return row_bytes(self.spec.weight, self.k)

    @property
    def chunk_bytes(self) -> int:
        """Bytes of the weights of one step."""
        return row_bytes(self.spec.weight, self.chunk)

    @property
    def prepared_bytes(self) -> int:
        """Bytes of one row of prepared activations, padded with zeros to whole chunks; a multiple of 64."""
        padded = -(-self.k // self.chunk) * self.chunk
        return -(-padded * (2 if self.paired else 4) // 64) * 64

    # -- activations -------------------------------------------------------------------------------

    def prepare(self, e: Emitter, x: Value, prepared: Value) -> None:
        """Write the bf16 row at `x` to the 64-byte aligned `prepared` in the form's order and format."""
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
            return list(range(self.lanes))
        if self.spec.weight == "fp8":
            lanes = [
                [16 * lane + half * 8 + i for lane in range(4) for i in range(8)] for half in (0, 1)
            ]
            return lanes[0] + lanes[1]
        if self.spec.weight == "int4":
            return [4 * word + nibble for nibble in range(4) for word in range(32)]
        return list(range(32))

    def _prepare_unit(self, e: Emitter, x: Value, prepared: Value, k: Value, valid: int) -> None:
        b, order = e.b, self._order()
        zero = e.zeros(I16, self.width)
        parts = [
            masked_vec(e, x, b.add(k, const(start)), I16, self.width, valid - start)
            if valid > start
            else zero
            for start in range(0, len(order), self.width)
        ]
        joined = _concat(e, parts)
        for start in range(0, len(order), self.width):
            lanes = [ir.Constant(I32, lane) for lane in order[start : start + self.width]]
            vector = b.shuffle_vector(
                joined,
                ir.Constant(joined.type, ir.Undefined),
                ir.Constant(vec(I32, len(lanes)), lanes),
            )
            if not self.paired:
                vector = e.bf16_to_f32(vector)
            e.store(vector, prepared, b.add(k, const(start)), align=32)

    def activations(self, e: Emitter, prepared: Value, k: Value, step: int) -> Value:
        """Vector `step` of the chunk that starts at element `k`, to go with `weights(...)[step]`."""
        index = e.b.add(k, const(step * self.width))
        if self.paired:
            return e.load_vec(prepared, index, I16, self.width, align=64)
        return e.load_vec(prepared, index, F32, self.width, align=32)

    # -- weights -----------------------------------------------------------------------------------

    def weights(self, e: Emitter, row: Value, k: Value, valid: int) -> list[Value]:
        """The first `valid` weights of the chunk at element `k` of the row at `row`; reads nothing past them."""
        valid = min(valid, self.chunk)
        if not self.paired:
            return weights_f32(e, self.spec.weight, row, k, valid)
        if self.spec.weight == "fp8":
            return self._fp8(e, row, k, valid)
        if self.spec.weight == "int4":
            return self._int4(e, row, k, valid)
        return [
            masked_vec(e, row, e.b.add(k, const(start)), I16, 32, valid - start)
            for start in range(0, valid, 32)
        ]

    def _fp8(self, e: Emitter, row: Value, k: Value, valid: int) -> list[Value]:
        b = e.b
        bits = e4m3_as_bf16()
        high, low = (_bytes(bits >> 8), _bytes(bits & 0xFF))
        kind = vec(I8, 64)
        undef_order = [
            [16 * lane + half * 8 + i for lane in range(4) for i in range(8)] for half in (0, 1)
        ]
        vectors = []
        for start in range(0, valid, 64):
            codes = masked_vec(e, row, b.add(k, const(start)), I8, 64, valid - start)

            def lookup(table: list[int], codes: Value = codes) -> Value:
                halves = [
                    ir.Constant(kind, [ir.Constant(I8, byte) for byte in table[at : at + 64]])
                    for at in (0, 64)
                ]
                name = "llvm.x86.avx512.vpermi2var.qi.512"
                return e.call(name, kind, halves[0], codes, halves[1])

            sign = b.and_(codes, splat_int(I8, 64, 0x80))
            upper, lower = b.or_(lookup(high), sign), lookup(low)
            for lanes in undef_order:
                mask = [ir.Constant(I32, at) for lane in lanes for at in (lane, lane + 64)]
                words = b.shuffle_vector(lower, upper, ir.Constant(vec(I32, 64), mask))
                vectors.append(b.bitcast(words, vec(I16, 32)))
        return vectors

    def _int4(self, e: Emitter, row: Value, k: Value, valid: int) -> list[Value]:
        b = e.b
        kind = vec(I16, 32)
        values = (np.arange(32) % 16 - 8).astype(np.float32).view(np.uint32) >> 16
        table = ir.Constant(kind, [ir.Constant(I16, int(value)) for value in values])
        words = masked_vec(e, row, b.lshr(k, const(2)), I16, 32, -(-valid // 4))
        return [
            e.call(
                "llvm.x86.avx512.permvar.hi.512",
                kind,
                table,
                b.lshr(words, splat_int(I16, 32, 4 * nibble)) if nibble else words,
            )
            for nibble in range(4)
        ]

    def multiply(self, e: Emitter, total: Value, weights: Value, activations: Value) -> Value:
        """`total` + weights * activations, lane by lane (pair by pair)."""
        if not self.paired:
            return e.fma(weights, activations, total)
        pairs = [e.b.bitcast(value, vec(BF16, 32)) for value in (weights, activations)]
        return e.call("llvm.x86.avx512bf16.dpbf16ps.512", total.type, total, *pairs)

    # -- scales ------------------------------------------------------------------------------------

    @property
    def scaled(self) -> bool:
        """Whether chunks have scales."""
        return self.spec.weight in ("fp8", "int4")

    def scale_row(self, e: Emitter, scale: Value, row: Value) -> Value:
        """Address of the scales of row `row`: `scale` is [ceil(n / 128), ceil(k / 128)] (fp8) or [n, ceil(k / group)]."""
        if self.spec.weight == "fp8":
            blocks = -(-self.k // FP8_BLOCK)
            return e.offset(scale, e.b.mul(e.b.lshr(row, const(7)), const(4 * blocks)))
        groups = -(-self.k // self.group)
        return e.offset(scale, e.b.mul(row, const(groups * self._scale_bytes)))

    @property
    def _scale_bytes(self) -> int:
        return self.spec.get("scale_bits", 32) // 8 if self.spec.weight == "int4" else 4

    def scale(self, e: Emitter, scales: Value, k: Value, valid: int) -> Value:
        """Factor of each accumulator lane for the chunk at element `k`; `scales` as from `scale_row`."""
        b = e.b
        per = self.group if self.spec.weight == "int4" else FP8_BLOCK
        count = max(1, self.chunk // per)
        valid_groups = -(-min(valid, self.chunk) // per)
        index = b.udiv(k, const(per))
        if self._scale_bytes == 4:
            if count == 1:
                return e.splat(e.load(scales, index, F32), self.lanes)
            few = masked_vec(e, scales, index, F32, count, valid_groups)
        else:
            if count == 1:
                return e.splat(e.bf16_to_f32(e.load(scales, index, I16)), self.lanes)
            few = e.bf16_to_f32(masked_vec(e, scales, index, I16, count, valid_groups))
        lanes = [ir.Constant(I32, lane * count // self.lanes) for lane in range(self.lanes)]
        undef = ir.Constant(few.type, ir.Undefined)
        return b.shuffle_vector(few, undef, ir.Constant(vec(I32, self.lanes), lanes))


def e4m3_as_bf16() -> np.ndarray[tuple[int], np.dtype[np.uint32]]:
    """BF16 bits of the magnitudes of the 128 E4M3FN codes; the last is NaN."""
    code = np.arange(128)
    exponent, mantissa = code >> 3, code & 7
    value = np.where(
        exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9
    ).astype(np.float32)
    bits = value.view(np.uint32) >> 16
    bits[127] = 0x7FC0
    return bits


def _bytes(values: np.ndarray[tuple[int], np.dtype[np.uint32]]) -> list[int]:
    return [int(value) for value in values]


def _concat(e: Emitter, parts: list[Value]) -> Value:
    """One vector of several equal ones (a power of two of them)."""
    while len(parts) > 1:
        count = parts[0].type.count
        lanes = ir.Constant(vec(I32, 2 * count), [ir.Constant(I32, i) for i in range(2 * count)])
        parts = [
            e.b.shuffle_vector(left, right, lanes)
            for left, right in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]
