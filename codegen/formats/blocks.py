"""Blocks of GGUF's formats to f32: one vector of neighbouring columns, bit for bit as
`hmc/formats/blocks.py` has it in numpy, which says how blocks are laid out.

Vectors never straddle groups of columns that share a scale: these are of 16 at least.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.formats.lookup import looked_up
from hmc.codegen.ir import F16, F32, I8, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.vector import splat_int
from hmc.formats import Format
from hmc.formats.codebooks import E2M1_DOUBLED, IQ4


@dataclass(frozen=True)
class Part:
    """`e.lanes` columns from `column` (i64) of the block at `block` (i8*) on."""

    e: Emitter
    block: Value
    column: Value

    def byte(self, at: Value | int) -> Value:
        """Byte `at` of the block, as i32."""
        at = const(at) if isinstance(at, int) else at
        return self.e.b.zext(self.e.load(self.block, at, I8), I32)

    def half(self, at: int) -> Value:
        """The f16 number at byte `at`, as f32 in all lanes."""
        start = self.e.offset(self.block, const(at))
        return self.splat(self.e.b.fpext(self.e.load(start, const(0), F16), F32))

    def splat(self, value: Value) -> Value:
        """`value` in all lanes."""
        return self.e.splat(value, self.e.lanes)

    def bits(self, at: int, run: int, each: int) -> Value:
        """Codes of `each` bits, as i32, that lie from byte `at` on: of every `run` bytes the lowest
        bits are of `run` columns, the next bits of the `run` columns after those, and so on.
        """
        e, b = self.e, self.e.b
        every = const(8 // each * run)
        group, place = b.udiv(self.column, every), b.urem(self.column, every)
        start = b.add(b.mul(group, const(run)), b.urem(place, const(run)))
        packed = e.load_vec(e.offset(self.block, const(at)), start, I8, e.lanes)
        shift = b.mul(b.udiv(place, const(run)), const(each))
        found = b.lshr(b.zext(packed, vec(I32, e.lanes)), self.splat(b.trunc(shift, I32)))
        return b.and_(found, splat_int(I32, e.lanes, 2**each - 1))

    def flags(self, at: int) -> Value:
        """Codes of a bit, as i32: of 32 columns, the first in the lowest bit of four bytes."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        places = b.add(self.splat(b.trunc(self.column, I32)), lanes_mask(range(lanes)))
        word = e.load(e.offset(self.block, const(at)), const(0), I32)
        return b.and_(b.lshr(self.splat(word), places), splat_int(I32, lanes, 1))

    def field(self, at: int, run: int, each: int, number: Value) -> Value:
        """Code `number` (i64) of such as `bits` reads, as i32."""
        b, per = self.e.b, 8 // each
        turn, place = b.udiv(number, const(per * run)), b.urem(number, const(per * run))
        byte = b.add(b.mul(turn, const(run)), b.urem(place, const(run)))
        shift = b.trunc(b.mul(b.udiv(place, const(run)), const(each)), I32)
        found = b.lshr(self.byte(b.add(const(at), byte)), shift)
        return b.and_(found, I32(2**each - 1))

    def number(self, code: Value) -> Value:
        """A whole number (i32) as f32 in all lanes."""
        return self.splat(self.e.b.sitofp(code, F32))

    def whole(self, at: int) -> Value:
        """Codes of i8, as f32, a byte each from byte `at` on."""
        start = self.e.offset(self.block, const(at))
        codes = self.e.load_vec(start, self.column, I8, self.e.lanes)
        return self.e.b.sitofp(codes, vec(F32, self.e.lanes))

    def less(self, codes: Value, zero: int) -> Value:
        """Codes (i32) less what stands for 0, as f32."""
        found = self.e.b.sub(codes, splat_int(I32, self.e.lanes, zero))
        return self.e.b.sitofp(found, vec(F32, self.e.lanes))

    def of_table(self, name: str, values: tuple[float, ...], codes: Value) -> Value:
        """`values[code]`."""
        lanes = (self.e.b.extract_element(codes, ir.Constant(I32, n)) for n in range(self.e.lanes))
        return looked_up(self.e, name, values, list(lanes))

    def group(self, columns: int) -> Value:
        """Number of the group of `columns` that the columns are in."""
        return self.e.b.udiv(self.column, const(columns))


def _q4_0(part: Part) -> Value:
    return part.e.b.fmul(part.half(0), part.less(part.bits(2, 16, 4), 8))


def _q4_1(part: Part) -> Value:
    return _more(part, part.bits(4, 16, 4))


def _more(part: Part, codes: Value) -> Value:
    scaled = part.e.b.fmul(part.half(0), part.less(codes, 0))
    return part.e.b.fadd(scaled, part.half(2))


def _five(part: Part, at: int) -> Value:
    high = part.e.b.shl(part.flags(at), splat_int(I32, part.e.lanes, 4))
    return part.e.b.or_(part.bits(at + 4, 16, 4), high)


def _q5_0(part: Part) -> Value:
    return part.e.b.fmul(part.half(0), part.less(_five(part, 2), 16))


def _q5_1(part: Part) -> Value:
    return _more(part, _five(part, 4))


def _iq4_nl(part: Part) -> Value:
    return part.e.b.fmul(part.half(0), part.of_table("iq4", IQ4, part.bits(2, 16, 4)))


def _q8_0(part: Part) -> Value:
    return part.e.b.fmul(part.half(0), part.whole(2))


def _scale_and_minimum(part: Part) -> tuple[Value, Value]:
    b = part.e.b
    group = part.group(32)
    early = b.icmp_unsigned("<", group, const(4))
    place = b.and_(group, const(3))
    first, second, last = (part.byte(b.add(place, const(at))) for at in (4, 8, 12))

    def of(low: Value, code: Value, half: Value) -> Value:
        """Of 6 bits: `low` whole, or its two top ones above four others."""
        late = b.or_(half, b.and_(b.lshr(low, I32(2)), I32(48)))
        both = b.select(early, b.and_(low, I32(63)), late)
        return b.fmul(code, part.splat(b.uitofp(both, F32)))

    scale = of(first, part.half(0), b.and_(last, I32(15)))
    return scale, of(second, part.half(2), b.lshr(last, I32(4)))


def _less_minimum(part: Part, codes: Value) -> Value:
    scale, minimum = _scale_and_minimum(part)
    return part.e.b.fsub(part.e.b.fmul(scale, part.less(codes, 0)), minimum)


def _q2_k(part: Part) -> Value:
    b, both = part.e.b, part.byte(part.group(16))
    scale = b.fmul(part.half(80), part.number(b.and_(both, I32(15))))
    minimum = b.fmul(part.half(82), part.number(b.lshr(both, I32(4))))
    return b.fsub(b.fmul(scale, part.less(part.bits(16, 32, 2), 0)), minimum)


_Field = tuple[int, int, int]


def _scale_of(part: Part, group: Value, at: int, low: _Field, high: _Field) -> Value:
    """The f16 number at byte `at` times a code of 6 bits, less 32."""
    b = part.e.b
    both = b.or_(part.field(*low, group), b.shl(part.field(*high, group), I32(4)))
    return b.fmul(part.half(at), part.number(b.sub(both, I32(32))))


def _q3_k(part: Part) -> Value:
    b = part.e.b
    high = b.shl(part.bits(0, 32, 1), splat_int(I32, part.e.lanes, 2))
    codes = part.less(b.or_(part.bits(32, 32, 2), high), 4)
    return b.fmul(_scale_of(part, part.group(16), 108, (96, 8, 4), (104, 4, 2)), codes)


def _q4_k(part: Part) -> Value:
    return _less_minimum(part, part.bits(16, 32, 4))


def _q5_k(part: Part) -> Value:
    b = part.e.b
    high = b.shl(part.bits(16, 32, 1), splat_int(I32, part.e.lanes, 4))
    return _less_minimum(part, b.or_(part.bits(48, 32, 4), high))


def _q6_k(part: Part) -> Value:
    e, b = part.e, part.e.b
    high = b.shl(part.bits(128, 32, 2), splat_int(I32, e.lanes, 4))
    codes = part.less(b.or_(part.bits(0, 64, 4), high), 32)
    one = e.load(e.offset(part.block, const(192)), part.group(16), I8)
    scale = b.fmul(part.splat(b.sitofp(one, F32)), part.half(208))
    return b.fmul(scale, codes)


def _iq4_xs(part: Part) -> Value:
    scale = _scale_of(part, part.group(32), 0, (4, 1, 4), (2, 1, 2))
    return part.e.b.fmul(scale, part.of_table("iq4", IQ4, part.bits(8, 16, 4)))


def _mxfp4(part: Part) -> Value:
    """The power is half of the exponent's, as the table is doubled; the first two are subnormal."""
    b = part.e.b
    exponent = part.byte(0)
    small = b.shl(I32(0x00200000), exponent)
    power = b.shl(b.sub(exponent, I32(1)), I32(23))
    power = b.select(b.icmp_unsigned("<", exponent, I32(2)), small, power)
    codes = part.of_table("e2m1_doubled", E2M1_DOUBLED, part.bits(1, 16, 4))
    return b.fmul(part.splat(b.bitcast(power, F32)), codes)


BLOCKS: Mapping[str, Callable[[Part], Value]] = {
    "q4_0": _q4_0,
    "q4_1": _q4_1,
    "q5_0": _q5_0,
    "q5_1": _q5_1,
    "q8_0": _q8_0,
    "q2_k": _q2_k,
    "q3_k": _q3_k,
    "q4_k": _q4_k,
    "q5_k": _q5_k,
    "q6_k": _q6_k,
    "iq4_nl": _iq4_nl,
    "iq4_xs": _iq4_xs,
    "ggml_mxfp4": _mxfp4,
}
"""By the name of a format."""


def block_weights(e: Emitter, row: Format, base: Value, k: Value) -> Value:
    """`<lanes x float>`: the weights from column `k` of the row at `base` on."""
    columns, size = row.codes.block
    block = e.offset(base, e.b.mul(e.b.udiv(k, const(columns)), const(size)))
    return BLOCKS[row.name](Part(e, block, e.b.urem(k, const(columns))))
