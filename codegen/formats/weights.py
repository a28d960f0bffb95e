"""Exact decode of stored weights to f32 vectors, in order: of formats with native decoders without
their scales, which belong to the accumulators; of all others with them (made.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.codegen.formats.made import made_f32
from hmc.codegen.formats.planes import Row, fp8_to_f32, planes_of
from hmc.codegen.ir import F16, F32, I8, I16, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.native import reads_planes
from hmc.codegen.spec import KernelSpec, WeightFormat
from hmc.codegen.vector import masked_vec, splat_int
from hmc.formats import format_of


@dataclass(frozen=True)
class Scales:
    """Scales of `bytes` bytes (f32 or bf16) for `rows` x `columns` weights, by which sums of codes
    are multiplied; 0 columns: none are.
    """

    rows: int
    columns: int
    bytes: int


def scales_of(spec: KernelSpec) -> Scales:
    """The scales that sums of the codes of `spec` are multiplied by."""
    for plane in planes_of(spec) if reads_planes(spec) else ():
        return Scales(plane.rows, plane.columns, plane.bytes)
    return Scales(1, 0, 4)


def row_bytes(weight_format: WeightFormat, k: int) -> int:
    """Bytes of one stored row of `k` weights; packed codes fill whole words."""
    return format_of(weight_format).row_bytes(k)


def span_bytes(weight_format: WeightFormat, columns: int) -> int:
    """Bytes of so many weights within a row, of blocks as many as fall to them."""
    width, size = format_of(weight_format).codes.block
    return -(-columns * size // width) if size else row_bytes(weight_format, columns)


def weights_f32(e: Emitter, spec: KernelSpec, row: Row, index: Value, count: int) -> list[Value]:
    """`count` consecutive weights of `row` from element `index` (i64) on, as f32.

    Returns ceil(count / lanes) vectors of the tier's width in memory order. Lanes past `count` are
    zero and nothing past element `index + count` is read. FP8 NaN codes give NaN. int4 weights are
    nibble - 8 without their scales; `index` must be a multiple of 8 and the last lanes are then -8
    + padding, not zero.
    """
    decode = _decode if reads_planes(spec) else made_f32
    return [
        decode(e, spec, row, e.b.add(index, const(start)), count - start)
        for start in range(0, count, e.lanes)
    ]


def _decode(e: Emitter, spec: KernelSpec, row: Row, index: Value, valid: int) -> Value:
    b, lanes = e.b, e.lanes
    if spec.weight == "fp8":
        return fp8_to_f32(e, masked_vec(e, row.codes, index, I8, lanes, valid))
    if spec.weight == "int4":
        word = b.lshr(index, const(3))
        return int4_to_f32(e, masked_vec(e, row.codes, word, I32, lanes // 8, -(-valid // 8)))
    (dtype,) = format_of(spec.weight).codes.dtypes
    if dtype == "BF16":
        return e.bf16_to_f32(masked_vec(e, row.codes, index, I16, lanes, valid))
    if dtype == "F16":
        bits = masked_vec(e, row.codes, index, I16, lanes, valid)
        return b.fpext(b.bitcast(bits, vec(F16, lanes)), vec(F32, lanes))
    return masked_vec(e, row.codes, index, F32, lanes, valid)


def int4_to_f32(e: Emitter, words: Value) -> Value:
    """Packed int32 words `<n x i32>` (8 weights each, low nibble first) to `<8n x float>` of nibble
    - 8.
    """
    b, count = e.b, words.type.count * 8
    order = lanes_mask([lane // 8 for lane in range(count)])
    shifts = lanes_mask([4 * (lane % 8) for lane in range(count)])
    spread = b.lshr(b.shuffle_vector(words, words, order), shifts)
    nibble = b.and_(spread, splat_int(I32, count, 15))
    return b.sitofp(b.sub(nibble, splat_int(I32, count, 8)), vec(F32, count))
