"""Exact decode of stored weights to f32 vectors, in order: fp8 (E4M3FN), bf16, fp16, f32 and int4
nibbles.

Hides how each tier decodes. FP8 goes through FP16: with sign and magnitude of the code moved to the
places FP16 has for them (`sign << 8 | magnitude << 7`), the FP16 value is the FP8 value x 2^-8,
subnormals included; widening to f32 and one multiply by 2^8 are exact. Only the NaN codes (0x7f,
0xff) are no NaN in FP16 and are made one. Block scales are not applied here: they belong to the
accumulators.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.ir import F16, F32, I1, I8, I16, I32, Emitter, Value, vec
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import FP8_BLOCK, KernelSpec, WeightFormat

IN_PAIRS: frozenset[WeightFormat] = frozenset({"fp8", "bf16", "int4"})
"""Formats whose weights, without their scales, bf16 holds exactly."""


@dataclass(frozen=True)
class Scales:
    """A scale of `bytes` bytes (f32 or bf16) for `rows` x `columns` weights; 0 columns: none."""

    rows: int
    columns: int
    bytes: int


def scales_of(spec: KernelSpec) -> Scales:
    """The scales of the weights that `spec` reads (int4: params group, scale_bits)."""
    known = {
        "fp8": Scales(FP8_BLOCK, FP8_BLOCK, 4),
        "int4": Scales(1, spec.get("group", 128), spec.get("scale_bits", 32) // 8),
    }
    return known.get(spec.weight, Scales(1, 0, 4))


def row_bytes(weight_format: WeightFormat, k: int) -> int:
    """Bytes of one stored row of `k` weights; int4 rows are whole int32 words of 8 weights."""
    if weight_format == "int4":
        return -(-k // 8) * 4
    return k * {"fp8": 1, "bf16": 2, "fp16": 2, "f32": 4}[weight_format]


def masked_vec(
    e: Emitter, base: Value, index: Value, element: ir.Type, count: int, valid: int
) -> Value:
    """`<count x element>` from element `index` on, of which only the first `valid` are read; the
    rest are zero.
    """
    if valid >= count:
        return e.load_vec(base, index, element, count)
    kind = vec(element, count)
    pointer = e.b.bitcast(e.at(base, index, element), kind.as_pointer())
    mask = ir.Constant(
        vec(I1, count), [ir.Constant(I1, int(lane < valid)) for lane in range(count)]
    )
    name = f"llvm.masked.load.v{count}{_SUFFIX[str(element)]}.p0"
    align = ir.Constant(I32, 1)
    return e.call(name, kind, pointer, align, mask, ir.Constant(kind, None))


_SUFFIX = {"i8": "i8", "i16": "i16", "i32": "i32", "float": "f32", "half": "f16"}


def splat_int(element: ir.IntType, count: int, value: int) -> ir.Constant:
    """A constant vector of `count` equal integers."""
    return ir.Constant(vec(element, count), [ir.Constant(element, value)] * count)


def weights_f32(
    e: Emitter, weight_format: WeightFormat, base: Value, index: Value, count: int
) -> list[Value]:
    """`count` consecutive weights from element `index` (i64) of the row-major i8* `base`, exactly,
    as f32.

    Returns ceil(count / lanes) vectors of the tier's width in memory order. Lanes past `count` are
    zero and nothing past element `index + count` is read. FP8 NaN codes give NaN. int4 weights are
    nibble - 8 without their scales; `index` must be a multiple of 8 and the last lanes are then -8
    + padding, not zero.
    """
    lanes = TIERS[e.spec.isa].lanes
    return [
        _decode(
            e,
            weight_format,
            base,
            e.b.add(index, ir.Constant(index.type, start)),
            lanes,
            count - start,
        )
        for start in range(0, count, lanes)
    ]


def _decode(
    e: Emitter, weight_format: WeightFormat, base: Value, index: Value, lanes: int, valid: int
) -> Value:
    b = e.b
    if weight_format == "fp8":
        return fp8_to_f32(e, masked_vec(e, base, index, I8, lanes, valid))
    if weight_format == "bf16":
        return e.bf16_to_f32(masked_vec(e, base, index, I16, lanes, valid))
    if weight_format == "fp16":
        bits = masked_vec(e, base, index, I16, lanes, valid)
        return b.fpext(b.bitcast(bits, vec(F16, lanes)), vec(F32, lanes))
    if weight_format == "int4":
        words = masked_vec(
            e, base, b.lshr(index, ir.Constant(index.type, 3)), I32, lanes // 8, -(-valid // 8)
        )
        return int4_to_f32(e, words)
    assert weight_format == "f32", weight_format
    return masked_vec(e, base, index, F32, lanes, valid)


def fp8_to_f32(e: Emitter, codes: Value) -> Value:
    """E4M3FN codes `<n x i8>` to f32, exactly."""
    b, count = e.b, codes.type.count
    wide = b.zext(codes, vec(I16, count))
    magnitude = b.and_(wide, splat_int(I16, count, 0x7F))
    shifted = b.shl(b.and_(wide, splat_int(I16, count, 0x80)), splat_int(I16, count, 8))
    half = b.or_(shifted, b.shl(magnitude, splat_int(I16, count, 7)))
    nan = b.sext(b.icmp_unsigned("==", magnitude, splat_int(I16, count, 0x7F)), half.type)
    value = b.fpext(b.bitcast(b.or_(half, nan), vec(F16, count)), vec(F32, count))
    scale = ir.Constant(vec(F32, count), [ir.Constant(F32, 256.0)] * count)
    return b.fmul(value, scale)


def int4_to_f32(e: Emitter, words: Value) -> Value:
    """Packed int32 words `<n x i32>` (8 weights each, low nibble first) to `<8n x float>` of nibble
    - 8.
    """
    b, count = e.b, words.type.count * 8
    undef = ir.Constant(words.type, ir.Undefined)
    order = ir.Constant(vec(I32, count), [ir.Constant(I32, lane // 8) for lane in range(count)])
    shifts = ir.Constant(
        vec(I32, count), [ir.Constant(I32, 4 * (lane % 8)) for lane in range(count)]
    )
    spread = b.lshr(b.shuffle_vector(words, undef, order), shifts)
    nibble = b.and_(spread, splat_int(I32, count, 15))
    return b.sitofp(b.sub(nibble, splat_int(I32, count, 8)), vec(F32, count))
