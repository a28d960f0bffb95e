"""Numbers beside codes, a few of them spread over the lanes of a vector: each in as many
neighbouring lanes as it covers columns.

Elements of a byte or two are loaded by one broadcast and shuffled to the top of the lanes that they
belong to, where a few operations make f32 of all of them at once.
"""

from __future__ import annotations

from llvmlite import ir

from hmc.codegen.formats.planes import ELEMENTS, Beside, number
from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, lanes_mask, vec
from hmc.codegen.vector import fsplat, isplat, masked_vec


def over_lanes(
    e: Emitter, plane: Beside, base: Value, index: Value, count: int, valid: int
) -> Value:
    """`<lanes x float>`: `count` elements from element `index` on, of which `valid` are read, each
    in its share of the lanes.
    """
    lanes = e.lanes
    element = ELEMENTS.get(plane.dtype, I8)
    if plane.dtype in _AT_THE_TOP and (lanes == 16 or element is I8):
        if count > 1 or element is I8:
            few = masked_vec(e, base, index, element, count, valid)
            return _AT_THE_TOP[plane.dtype](e, _tops(e, few))
    elif plane.dtype == "BF16" and count == 1:
        # In vector registers: a way through the others takes as long as a unit.
        words = e.splat(e.load(base, index, I16), 2 * lanes)
        upper = e.b.shl(e.b.bitcast(words, vec(I32, lanes)), isplat(16, lanes))
        return e.b.bitcast(upper, vec(F32, lanes))
    if count == 1:
        return e.splat(plane.load(e, base, index), lanes)
    few = number(e, plane.dtype, masked_vec(e, base, index, element, count, valid))
    spread = lanes_mask([lane * count // lanes for lane in range(lanes)])
    return e.b.shuffle_vector(few, ir.Constant(few.type, ir.Undefined), spread)


def _tops(e: Emitter, few: Value) -> Value:
    """`<lanes x i32>` with the elements `<1 to 8 x i8 or i16>` in the upper bits of their lanes."""
    b, lanes, count, element = e.b, e.lanes, few.type.count, few.type.element
    each = 4 * 8 // element.width  # elements of 32 bits
    every = lanes * each
    whole = ir.IntType(element.width * count)
    copies = b.bitcast(e.splat(b.bitcast(few, whole), every // count), vec(element, every))
    order = []
    for lane in range(lanes):
        here = lane // 4 * 4 * each  # what lies in the same 128 bits
        order += [every] * (each - 1) + [here + lane * count // lanes]
    top = b.shuffle_vector(copies, e.zeros(element, every), lanes_mask(order))
    return b.bitcast(top, vec(I32, lanes))


def _bf16(e: Emitter, tops: Value) -> Value:
    return e.b.bitcast(tops, vec(F32, tops.type.count))


def _e8m0(e: Emitter, tops: Value) -> Value:
    """Exponents; the first is an f32 subnormal, the last is NaN."""
    b, count = e.b, tops.type.count
    lifted, least = b.lshr(tops, isplat(1, count)), isplat(1 << 22, count)
    lifted = b.select(b.icmp_unsigned(">", lifted, least), lifted, least)
    nan = b.icmp_unsigned("==", tops, isplat(0xFF000000, count))
    lifted = b.select(nan, isplat(0x7FC00000, count), lifted)
    return b.bitcast(lifted, vec(F32, count))


def _e4m3(e: Emitter, tops: Value) -> Value:
    """Four bits further down it is, as an f32, the value x 2^-120, subnormal codes included."""
    b, count = e.b, tops.type.count
    moved = b.and_(b.ashr(tops, isplat(4, count)), isplat(0x87F00000, count))
    value = b.fmul(b.bitcast(moved, vec(F32, count)), fsplat(2.0**120, count))
    magnitude = b.and_(tops, isplat(0x7F000000, count))
    nan = b.icmp_unsigned("==", magnitude, isplat(0x7F000000, count))
    return b.select(nan, fsplat(float("nan"), count), value)


_AT_THE_TOP = {"BF16": _bf16, "F8_E8M0": _e8m0, "F8_E4M3": _e4m3}
"""Elements in the upper bits of lanes, zeros behind them, as f32."""
