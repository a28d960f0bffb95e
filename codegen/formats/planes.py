"""What lies beside the codes of a weight: where its elements are, and what numbers they are.

Kernels are handed one address for all of it: that of the plane, or where there are several, of an
array of the addresses of all of them, in the order of the format's row.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.ir import F16, F32, I8, I16, I32, I64, Emitter, Value, const, vec
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import fsplat, splat_int
from hmc.formats import DTYPE_BITS, GROUP, Plane, format_of
from hmc.formats.base import Kind

ALL = 1 << 40
"""Rows or columns of an element that covers as many as there are."""

ELEMENTS = {"F32": F32, "F16": F16, "BF16": I16, "I32": I32}
"""How elements of more than a byte are loaded."""


@dataclass(frozen=True)
class Beside:
    """A plane of `kind`: an element of `dtype` for `rows` x `columns` of a weight."""

    kind: Kind
    dtype: str
    rows: int
    columns: int

    @property
    def bytes(self) -> int:
        """Of an element."""
        return DTYPE_BITS[self.dtype] // 8

    def row_bytes(self, k: int) -> int:
        """From one row of elements to the next, for rows of `k` weights."""
        return -(-k // self.columns) * self.bytes

    def row(self, e: Emitter, address: Value, row: Value, k: int) -> Value:
        """Address of the elements that cover `row` of a weight whose plane is at `address`."""
        if self.rows > 1:
            row = e.b.udiv(row, const(self.rows))
        return e.offset(address, e.b.mul(row, const(self.row_bytes(k))))

    def load(self, e: Emitter, row: Value, index: Value) -> Value:
        """Element `index` of the elements at `row`, as f32."""
        return number(e, self.dtype, e.load(row, index, ELEMENTS.get(self.dtype, I8)))


@dataclass(frozen=True)
class Row:
    """A row of a weight: i8* of its codes, and of the elements of each plane that cover it."""

    codes: Value
    planes: tuple[Value, ...]


def planes_of(spec: KernelSpec) -> tuple[Beside, ...]:
    """What lies beside the codes of the weights that `spec` reads (grouped formats: params group;
    `<plane>_dtype` where a plane is kept in several).
    """
    found = []
    for plane in format_of(spec.weight).scales:
        columns = spec["group"] if plane.columns == GROUP else plane.columns
        dtype = _dtype(spec, plane)
        found.append(Beside(plane.kind, dtype, plane.rows or ALL, columns or ALL))
    return tuple(found)


def _dtype(spec: KernelSpec, plane: Plane) -> str:
    """What the elements of a plane are in memory."""
    if len(plane.kept) > 1:
        return plane.kept[spec.get(f"{plane.name}_dtype")]
    return plane.in_memory(plane.dtypes[0])


def addresses(e: Emitter, planes: tuple[Beside, ...], beside: Value) -> list[Value]:
    """i8* of each plane."""
    if len(planes) < 2:
        return [beside] * len(planes)
    words = (e.load(beside, const(at), I64, align=8) for at in range(len(planes)))
    return [e.b.inttoptr(word, I8.as_pointer()) for word in words]


def number(e: Emitter, dtype: str, raw: Value) -> Value:
    """An element, or a vector of them, as it was loaded, as f32, exactly."""
    many = isinstance(raw.type, ir.VectorType)
    if dtype in _BYTES:
        if many:
            return _BYTES[dtype](e, raw)
        first = ir.Constant(I32, 0)
        alone = e.b.insert_element(e.zeros(raw.type, 4), raw, first)
        return e.b.extract_element(_BYTES[dtype](e, alone), first)
    if dtype == "BF16":
        return e.bf16_to_f32(raw)
    if dtype == "F16":
        return e.b.fpext(raw, vec(F32, raw.type.count) if many else F32)
    return raw


def fp8_to_f32(e: Emitter, codes: Value) -> Value:
    """E4M3FN codes `<n x i8>` to f32, exactly.

    With sign and magnitude of the code moved to the places FP16 has for them (`sign << 8 |
    magnitude << 7`), the FP16 value is the FP8 value x 2^-8, subnormals included; widening to f32
    and one multiply by 2^8 are exact. Only the NaN codes (0x7f, 0xff) are no NaN in FP16 and are
    made one.
    """
    b, count = e.b, codes.type.count
    wide = b.zext(codes, vec(I16, count))
    magnitude = b.and_(wide, splat_int(I16, count, 0x7F))
    shifted = b.shl(b.and_(wide, splat_int(I16, count, 0x80)), splat_int(I16, count, 8))
    half = b.or_(shifted, b.shl(magnitude, splat_int(I16, count, 7)))
    nan = b.sext(b.icmp_unsigned("==", magnitude, splat_int(I16, count, 0x7F)), half.type)
    value = b.fpext(b.bitcast(b.or_(half, nan), vec(F16, count)), vec(F32, count))
    return b.fmul(value, fsplat(256.0, count))


def _e5m2_to_f32(e: Emitter, codes: Value) -> Value:
    """The upper half of an FP16."""
    b, count = e.b, codes.type.count
    half = b.shl(b.zext(codes, vec(I16, count)), splat_int(I16, count, 8))
    return b.fpext(b.bitcast(half, vec(F16, count)), vec(F32, count))


def e8m0_to_f32(e: Emitter, codes: Value) -> Value:
    """Exponents: 2^(code - 127), of which the first is an f32 subnormal; the last is NaN."""
    b, count = e.b, codes.type.count
    wide = b.zext(codes, vec(I32, count))
    lifted = b.shl(wide, splat_int(I32, count, 23))
    none = b.icmp_unsigned("==", wide, splat_int(I32, count, 0))
    lifted = b.select(none, splat_int(I32, count, 1 << 22), lifted)
    nan = b.icmp_unsigned("==", wide, splat_int(I32, count, 255))
    lifted = b.select(nan, splat_int(I32, count, 0x7FC00000), lifted)
    return b.bitcast(lifted, vec(F32, count))


_BYTES = {"F8_E4M3": fp8_to_f32, "F8_E5M2": _e5m2_to_f32, "F8_E8M0": e8m0_to_f32}
"""Elements of a byte: how vectors of them become f32."""


def spread(e: Emitter, plane: Beside, row: Value, k: Value, count: int) -> Value:
    """A vector of the tier: the elements at `row` that cover the `count` columns from `k` (a
    multiple of its lanes) on.
    """
    if plane.columns == ALL:
        return e.splat(plane.load(e, row, const(0)), e.lanes)
    if plane.columns % e.lanes == 0:
        return e.splat(plane.load(e, row, e.b.udiv(k, const(plane.columns))), e.lanes)
    found: Value = e.zeros(F32, e.lanes)
    for lane in range(count):
        index = e.b.udiv(e.b.add(k, const(lane)), const(plane.columns))
        one = plane.load(e, row, index)
        found = e.b.insert_element(found, one, ir.Constant(I32, lane))
    return found
