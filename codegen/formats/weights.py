"""Exact decode of stored weights to f32 vectors, in order, and where their scales lie; for every
format: those without a decoder of their own by a table of their codes.

Hides how codes become numbers. FP8 goes through FP16: with sign and magnitude of the code moved to
the places FP16 has for them (`sign << 8 | magnitude << 7`), the FP16 value is the FP8 value x 2^-8,
subnormals included; widening to f32 and one multiply by 2^8 are exact. Only the NaN codes (0x7f,
0xff) are no NaN in FP16 and are made one. Scales are not applied here: they belong to the
accumulators.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.ir import F16, F32, I1, I8, I16, I32, I64, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.spec import KernelSpec, WeightFormat
from hmc.codegen.vector import fsplat, splat_int
from hmc.formats import DTYPE_BITS, GROUP, Format, Plane, format_of

ALL = 1 << 40
"""Rows or columns of a scale that covers as many as there are."""


@dataclass(frozen=True)
class Scales:
    """A scale of `bytes` bytes (f32 or bf16) for `rows` x `columns` weights; 0 columns: none."""

    rows: int
    columns: int
    bytes: int

    def row_of(self, e: Emitter, row: Value) -> Value:
        """Number of the row of scales that a row of weights has."""
        return e.b.lshr(row, const(self.rows.bit_length() - 1)) if self.rows > 1 else row

    def row_bytes(self, k: int) -> int:
        """Bytes from one row of stored scales to the next, for rows of `k` weights."""
        return -(-k // self.columns) * self.bytes if self.columns else 0


def scales_of(spec: KernelSpec) -> Scales:
    """The scales of the weights that `spec` reads (grouped formats: params group, scale_dtype)."""
    for plane in format_of(spec.weight).scales:
        columns = spec["group"] if plane.columns == GROUP else plane.columns
        return Scales(plane.rows or ALL, columns or ALL, DTYPE_BITS[scale_dtype(spec, plane)] // 8)
    return Scales(1, 0, 4)


def scale_dtype(spec: KernelSpec, plane: Plane) -> str:
    """What the elements of a plane of the weights that `spec` reads are in memory."""
    if len(plane.kept) > 1:
        return plane.kept[spec.get(f"{plane.name}_dtype")]
    return plane.in_memory(plane.dtypes[0])


def row_bytes(weight_format: WeightFormat, k: int) -> int:
    """Bytes of one stored row of `k` weights; packed codes fill whole words."""
    return format_of(weight_format).row_bytes(k)


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
    mask = ir.Constant(vec(I1, count), [int(lane < valid) for lane in range(count)])
    name = f"llvm.masked.load.v{count}{_SUFFIX[str(element)]}.p0"
    align = ir.Constant(I32, 1)
    return e.call(name, kind, pointer, align, mask, ir.Constant(kind, None))


_SUFFIX = {"i8": "i8", "i16": "i16", "i32": "i32", "float": "f32", "half": "f16"}


def bf16_bits(
    e: Emitter, x: Value, k: Value, count: int, valid: int, width: int
) -> Iterator[Value]:
    """`count` elements of the bf16 row at `x` from `k` on, in vectors of `width`; zeros past
    `valid`.
    """
    for at in range(0, count, width):
        if at < valid:
            yield masked_vec(e, x, e.b.add(k, const(at)), I16, width, valid - at)
        else:
            yield e.zeros(I16, width)


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
    lanes = e.lanes
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
    b, row = e.b, format_of(weight_format)
    if weight_format == "fp8":
        return fp8_to_f32(e, masked_vec(e, base, index, I8, lanes, valid))
    if weight_format == "int4":
        words = masked_vec(
            e, base, b.lshr(index, ir.Constant(index.type, 3)), I32, lanes // 8, -(-valid // 8)
        )
        return int4_to_f32(e, words)
    if row.values:
        return looked_up(e, row, base, index, lanes, valid)
    (dtype,) = row.codes.dtypes
    if dtype == "BF16":
        return e.bf16_to_f32(masked_vec(e, base, index, I16, lanes, valid))
    if dtype == "F16":
        bits = masked_vec(e, base, index, I16, lanes, valid)
        return b.fpext(b.bitcast(bits, vec(F16, lanes)), vec(F32, lanes))
    return masked_vec(e, base, index, F32, lanes, valid)


def looked_up(e: Emitter, row: Format, base: Value, index: Value, lanes: int, valid: int) -> Value:
    """Codes of 2, 4 or 8 bits to f32 by a table of their values, one load a code: what a format has
    on its first day. Bits of one byte are codes from the lowest on. A routine of its own, since it
    is long.
    """
    each = 8 // row.code_bits
    kind, valid = vec(F32, lanes), min(valid, lanes)
    name = f"lookup_{row.name}_{valid}"
    if name not in e.module.globals:
        with e.subroutine(name, I8.as_pointer(), kind.as_pointer()) as (start, out):
            packed = masked_vec(e, start, const(0), I8, lanes // each, -(-valid // each))
            e.b.store(_values(e, row, packed, lanes), out)
    shift = ir.Constant(index.type, each.bit_length() - 1)
    start = e.offset(base, e.b.lshr(index, shift) if each > 1 else index)
    found = e.local(kind)
    e.b.call(e.module.globals[name], [start, found])
    return e.b.load(found)


def _values(e: Emitter, row: Format, packed: Value, lanes: int) -> Value:
    """`<lanes x float>` of codes packed in bytes."""
    b, bits, each = e.b, row.code_bits, 8 // row.code_bits
    table = _table(e, row)
    found: Value = ir.Constant(vec(F32, lanes), ir.Undefined)
    for lane in range(lanes):
        code = b.extract_element(packed, ir.Constant(I32, lane // each))
        if each > 1:
            code = b.lshr(code, ir.Constant(I8, lane % each * bits))
            code = b.and_(code, ir.Constant(I8, 2**bits - 1))
        value = e.load(table, b.zext(code, I64), F32, align=4)
        found = b.insert_element(found, value, ir.Constant(I32, lane))
    return found


def _table(e: Emitter, row: Format) -> Value:
    """i8* of the f32 values of every code."""
    name = f"values_{row.name}"
    known = e.module.globals.get(name)
    if known is None:
        bits = struct.unpack(f"{len(row.values)}I", struct.pack(f"{len(row.values)}f", *row.values))
        kind = ir.ArrayType(I32, len(bits))
        known = ir.GlobalVariable(e.module, kind, name)
        known.linkage, known.global_constant, known.align = "private", True, 64
        known.initializer = ir.Constant(kind, [ir.Constant(I32, each) for each in bits])
    return e.b.bitcast(known, I8.as_pointer())


def fp8_to_f32(e: Emitter, codes: Value) -> Value:
    """E4M3FN codes `<n x i8>` to f32, exactly."""
    b, count = e.b, codes.type.count
    wide = b.zext(codes, vec(I16, count))
    magnitude = b.and_(wide, splat_int(I16, count, 0x7F))
    shifted = b.shl(b.and_(wide, splat_int(I16, count, 0x80)), splat_int(I16, count, 8))
    half = b.or_(shifted, b.shl(magnitude, splat_int(I16, count, 7)))
    nan = b.sext(b.icmp_unsigned("==", magnitude, splat_int(I16, count, 0x7F)), half.type)
    value = b.fpext(b.bitcast(b.or_(half, nan), vec(F16, count)), vec(F32, count))
    return b.fmul(value, fsplat(256.0, count))


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
