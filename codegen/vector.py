"""Vector building blocks that many emitters share: ragged loads and stores, row loops, exp and
sigmoid.

Hides what is special about the last, incomplete vector of a row: it is loaded exactly (never a byte
beyond the row) and padded with zeros, so that bodies always see full vectors.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from functools import cache, lru_cache, reduce

from llvmlite import ir

from hmc.codegen.ir import (
    BF16,
    F16,
    F32,
    I1,
    I16,
    I32,
    Emitter,
    Value,
    const,
    fconst,
    lanes_mask,
    vec,
)

ELEMENTS = {"bf16": I16, "fp16": F16, "f32": F32}
"""How a storage format is loaded; bf16 travels as its bits."""


def place(e: Emitter, format_name: str, base: Value, index: Value) -> Value:
    """Address (i8*) of element `index` of an array in a storage format."""
    return e.offset(base, e.b.mul(index, const(4 if ELEMENTS[format_name] is F32 else 2)))


def unpack_order(count: int, half: int, groups: int = 4) -> list[int]:
    """Lanes of two vectors of `count` that `vpunpckl` (half 0) or `vpunpckh` (half 1) lays side by
    side, in `groups` groups of 128 bits.
    """
    each = count // groups
    return [
        group * each + half * each // 2 + item // 2 + item % 2 * count
        for group in range(groups)
        for item in range(each)
    ]


def unpack_masks(count: int, groups: int = 4) -> list[ir.Constant]:
    """Both halves of `unpack_order`."""
    return [lanes_mask(unpack_order(count, half, groups)) for half in range(2)]


def concat(e: Emitter, parts: list[Value]) -> Value:
    """One vector of several equal ones (a power of two of them)."""
    while len(parts) > 1:
        mask = lanes_mask(range(2 * parts[0].type.count))
        parts = [
            e.b.shuffle_vector(left, right, mask)
            for left, right in zip(parts[::2], parts[1::2], strict=True)
        ]
    return parts[0]


def cut(e: Emitter, vector: Value, count: int) -> list[Value]:
    """The parts of `count` lanes that a vector has."""
    return [
        e.b.shuffle_vector(vector, vector, lanes_mask(range(at, at + count)))
        for at in range(0, vector.type.count, count)
    ]


def in_groups(
    vectors: list[Value], columns: int, add: Callable[[Value, Value], Value]
) -> list[Value]:
    """Vectors of each `columns` elements added up, lane by lane."""
    each = columns // vectors[0].type.count
    return [reduce(add, vectors[at : at + each]) for at in range(0, len(vectors), each)]


def resize(e: Emitter, vector: Value, count: int) -> Value:
    """`vector` cut to its first `count` lanes, or padded with zero lanes."""
    have = vector.type.count
    if have == count:
        return vector
    mask = [lane if lane < have else have for lane in range(count)]
    return e.b.shuffle_vector(vector, ir.Constant(vector.type, None), lanes_mask(mask))


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


def load_part(
    e: Emitter, base: Value, index: Value, element: ir.Type, count: int, lanes: int
) -> Value:
    """`count` <= `lanes` elements from element `index` on, padded with zeros to `lanes`."""
    if count == 1:  # no vector of one lane: LLVM 22 aborts where it combines some of them
        one = e.load(base, index, element)
        return e.b.insert_element(e.zeros(element, lanes), one, ir.Constant(I32, 0))
    return resize(e, e.load_vec(base, index, element, count), lanes)


def store_part(e: Emitter, value: Value, base: Value, index: Value, count: int) -> None:
    """Store the first `count` lanes of `value` at element `index`."""
    if count == 1:
        e.store(e.b.extract_element(value, ir.Constant(I32, 0)), base, index)
    else:
        e.store(resize(e, value, count), base, index)


def load_f32(
    e: Emitter, format_name: str, base: Value, index: Value, count: int, lanes: int = 0
) -> Value:
    """`count` elements stored as bf16, fp16 or f32, as `lanes` f32 (a vector of the tier where that
    is not said), zeros behind.
    """
    element, lanes = ELEMENTS[format_name], lanes or e.lanes
    raw = load_part(e, base, index, element, count, lanes)
    if element is I16:
        return e.bf16_to_f32(raw)
    if element is F16:
        return e.b.fpext(raw, vec(F32, lanes))
    return raw


def store_f32(
    e: Emitter, format_name: str, value: Value, base: Value, index: Value, count: int
) -> None:
    """Store `count` lanes of f32 `value` as bf16 (to nearest even) or f32."""
    is_bf16 = ELEMENTS[format_name] is I16
    store_part(e, e.f32_to_bf16(value) if is_bf16 else value, base, index, count)


def for_blocks(e: Emitter, width: int, size: int, body: Callable[[Value, int], None]) -> None:
    """Emit `body(index, count)` over `width` items in blocks of `size`; the last may be shorter."""
    whole = width // size * size
    if whole:
        with e.for_range(0, whole, size) as start:
            body(start, size)
    if whole < width:
        body(const(whole), width - whole)


def for_strips(
    e: Emitter, width: int, lanes: int, body: Callable[[Value, int, int], None], ways: int = 1
) -> None:
    """Emit `body(index, count, way)` over a row of `width`, in strips of `lanes` (count < lanes in
    the last).

    `ways` strips go into one loop round, so that `body` can keep as many accumulators (`way`
    numbers them).
    """
    round_ = lanes * ways
    whole = width // round_ * round_
    if whole:
        with e.for_range(0, whole, round_) as start:
            for way in range(ways):
                body(e.b.add(start, const(way * lanes)), lanes, way)
    for way, start in enumerate(range(whole, width, lanes)):
        body(const(start), min(lanes, width - start), way)


def copy_row(
    e: Emitter, stored: str, source: Value, out: str, target: Value, width: int, ways: int = 1
) -> None:
    """`width` elements in format `stored` at `source` to format `out` at `target`."""

    def strip(index: Value, count: int, way: int) -> None:
        store_f32(e, out, load_f32(e, stored, source, index, count), target, index, count)

    for_strips(e, width, e.lanes, strip, ways)


def fsplat(value: float, count: int) -> ir.Constant:
    """A constant f32 vector."""
    return _fsplat(_f32(value).hex(), count)


@cache
def _fsplat(value: str, count: int) -> ir.Constant:
    """`value` in hex: -0 is not 0."""
    return ir.Constant(vec(F32, count), [fconst(float.fromhex(value))] * count)


@lru_cache(typed=True)
def splat_int(element: ir.IntType, count: int, value: int) -> ir.Constant:
    """A constant vector of `count` equal integers."""
    return ir.Constant(vec(element, count), [ir.Constant(element, value)] * count)


def isplat(value: int, count: int) -> ir.Constant:
    """A constant i32 vector."""
    return splat_int(I32, count, value)


def fmax(e: Emitter, left: Value, right: Value) -> Value:
    """Lanewise larger of two f32 vectors; `right` where either is NaN."""
    return e.b.select(e.b.fcmp_ordered(">", left, right), left, right)


def polynomial(e: Emitter, x: Value, *factors: float) -> Value:
    """The sum of factors times powers of an f32 vector, the highest first."""
    total: Value = fsplat(factors[0], x.type.count)
    for factor in factors[1:]:
        total = e.fma(total, x, fsplat(factor, x.type.count))
    return total


_LN2_HIGH = 0.693359375  # nine bits of ln 2: n * _LN2_HIGH is exact for every exponent n
_LN2_LOW = math.log(2) - _LN2_HIGH
_ROUND = 1.5 * 2.0**23  # adding it leaves round(x) in the low mantissa bits
_EXP_LOW, _EXP_HIGH = -87.3365, 88.37


def exp(e: Emitter, x: Value) -> Value:
    """e**x of an f32 vector, relative error < 2e-7; 0 below -87.34, e**88.37 above that, NaN stays
    NaN.

    Cody and Waite's reduction x = n ln 2 + r with |r| <= ln 2 / 2, then the Taylor polynomial of
    degree 7 (truncation r**8 / 8! < 6e-9) and n added to the exponent.
    """
    b, count = e.b, x.type.count
    high, low = fsplat(_EXP_HIGH, count), fsplat(_EXP_LOW, count)
    x = b.select(b.fcmp_ordered(">", x, high), high, x)
    shifted = e.fma(x, fsplat(1 / math.log(2), count), fsplat(_ROUND, count))
    n = b.fsub(shifted, fsplat(_ROUND, count))
    r = e.fma(n, fsplat(-_LN2_HIGH, count), x)
    r = e.fma(n, fsplat(-_LN2_LOW, count), r)
    total = polynomial(e, r, *(1 / math.factorial(power) for power in range(7, -1, -1)))
    words = vec(I32, count)
    exponent = b.shl(b.add(b.bitcast(shifted, words), isplat(127, count)), isplat(23, count))
    result = b.fmul(total, b.bitcast(exponent, x.type))
    return b.select(b.fcmp_ordered("<", x, low), fsplat(0.0, count), result)


def sigmoid(e: Emitter, x: Value) -> Value:
    """1 / (1 + e**-x) of an f32 vector."""
    one = fsplat(1.0, x.type.count)
    return e.b.fdiv(one, e.b.fadd(one, exp(e, e.b.fneg(x))))


def sqrt(e: Emitter, x: Value) -> Value:
    """Square root of one f32."""
    return e.call("llvm.sqrt.f32", F32, x)


def dot_pairs(e: Emitter, total: Value, left: Value, right: Value) -> Value:
    """total + the dot products of bf16 pairs, one a lane, on tiers with `pair_dot`; the widths 4, 8
    and 16 exist.
    """
    count = total.type.count
    pairs = [e.b.bitcast(words, vec(BF16, 2 * count)) for words in (left, right)]
    return e.call(f"llvm.x86.avx512bf16.dpbf16ps.{32 * count}", total.type, total, *pairs)


def _f32(value: float) -> float:
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
