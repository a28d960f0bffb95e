"""Blocks of GGUF as bytes or words of 16 bits and their scales, for dot products of a few tokens:
codes are whole numbers (or entries of a table). `hmc/formats/blocks.py` says how blocks are laid
out.

Codes of 4 to 6 bits stand a byte each in a vector, as they lie in the block: of half a block (or of
four blocks of 32) the low halves of 64 bytes, then the high ones. Words of them are those of
codes in even and odd places (code_words.py): the order that activations are brought into
(block_dot.py), so nothing else moves between lanes, and a scale covers whole f32 lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from llvmlite import ir

from hmc.codegen.formats.block_kind import BYTES, LANES, WORDS, Block, Kind, spread, words_of
from hmc.codegen.formats.code_words import (
    FIVE_BITS,
    FOUR_BITS,
    LESS_8,
    LESS_16,
    LESS_32,
    moved,
)
from hmc.codegen.formats.small_codes import SMALL, SMALL_OF_BYTES
from hmc.codegen.ir import F16, F32, I1, I8, I16, I32, I64, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.vector import concat, isplat, resize, splat_int
from hmc.formats.codebooks import E2M1_DOUBLED, IQ4


def _masked(e: Emitter, words: Value, byte: int) -> Value:
    return e.b.and_(words, splat_int(I16, WORDS, byte * 0x101))


# -- blocks of 32 ----------------------------------------------------------------------------------


def _halves(block: Block, at: int) -> Value:
    """Of each of four blocks the f16 number at byte `at`; at byte 0 the scales of the one step."""
    halves = block.e.b.bitcast(block.each(at, I16), vec(F16, LANES))
    return block.e.b.fpext(halves, vec(F32, LANES))


def _powers(block: Block, step: int) -> Value:
    """Of each of four blocks half of the power of two whose exponent is at byte 0; the first two
    are subnormal.
    """
    b = block.e.b
    exponent = b.zext(block.each(0, I8), vec(I32, LANES))
    small = b.shl(isplat(0x00200000, LANES), exponent)
    power = b.shl(b.sub(exponent, isplat(1, LANES)), isplat(23, LANES))
    few = b.icmp_unsigned("<", exponent, isplat(2, LANES))
    return b.bitcast(b.select(few, small, power), vec(F32, LANES))


def _fifths(block: Block, at: int) -> Value:
    """Of each of four blocks 16 bits from byte `at` on, each as 16 of a byte."""
    b, all_ = block.e.b, const(0)
    for number in range(block.count):
        bits = b.zext(block.load(number * block.size + at, I16), I64)
        all_ = b.or_(all_, b.shl(bits, const(16 * number)))
    set_ = b.bitcast(all_, vec(I1, BYTES))
    found = b.select(set_, splat_int(I8, BYTES, 16), splat_int(I8, BYTES, 0))
    return words_of(found, block.e)


def _four(
    values: Sequence[float],
    at: int,
    scales: Callable[[Block, int], Value],
    minima: Callable[[Block], Value] | None = None,
    high: int | None = None,
) -> Kind:
    """Four blocks of 32 codes of 4 bits, from byte `at` of each on: one step of four vectors; the
    fifth bits are at byte `high`.
    """

    def vectors(block: Block, step: int) -> list[Value]:
        e, words, found = block.e, words_of(block.sixteens(at), block.e), []
        for part in range(2):
            codes = moved(e, words, -4 * part)
            if high is not None:
                codes = e.b.or_(_masked(e, codes, 0x0F), _fifths(block, high + 2 * part))
            found += block.pairs(values, codes)
        return found

    def lifted(block: Block) -> Value:
        return block.once(scales, 0)

    columns = _in_places(_SIXTEENS) + _in_places([column + 16 for column in _SIXTEENS])
    fourths, least = range(0, LANES, 4), int(min(values))
    return Kind(128, (columns,), vectors, scales, minima, 32, fourths, least, lifted)


def _added(block: Block) -> Value:
    """Of each of four blocks the f16 number at byte 2."""
    return _halves(block, 2)


def _bytes(block: Block, step: int) -> list[Value]:
    """Two's complement, always words."""
    return [block.e.b.sext(block.bytes(2, WORDS), vec(I16, WORDS))]


# -- blocks of 256: steps of the low and the high halves of 64 bytes, twice ------------------------


def _eights(block: Block, odd: int = 1) -> Value:
    """Of eight groups the scales, then of each what is added: codes of 6 bits, the lower ones of
    which lie in 4 bytes each, the upper ones in nibbles of 4 bytes and the top bits of the lower.
    Scales of odd groups are divided by `odd`.
    """
    e, b = block.e, block.e.b
    words = b.bitcast(block.bytes(0, 16), vec(I16, 8))
    bytes_ = [b.bitcast(moved(e, words, -right), vec(I8, 16)) for right in (0, 4, 2)]

    def chosen(first: Value, second: Value, *starts: int) -> Value:
        return b.shuffle_vector(
            first, second, lanes_mask([start + i for start in starts for i in range(4)])
        )

    def masked(some: Value, *masks: int) -> Value:
        return b.and_(some, ir.Constant(vec(I8, 16), [mask for mask in masks for _ in range(4)]))

    low = masked(chosen(bytes_[0], bytes_[1], 4, 12, 8, 16 + 12), 63, 15, 63, 15)
    top = masked(chosen(bytes_[2], bytes_[2], 4, 4, 8, 8), 0, 48, 0, 48)
    codes = b.uitofp(b.zext(b.or_(low, top), vec(I32, LANES)), vec(F32, LANES))
    halves = b.bitcast(e.splat(block.load(0, I32), 2), vec(F16, 4))
    factors = b.fmul(
        b.fpext(halves, vec(F32, 4)), ir.Constant(vec(F32, 4), [1.0, -1.0, 1 / odd, 0.0])
    )
    return b.fmul(codes, spread(block, factors, [0, 2] * 4 + [1] * 8))


def _of_eight(vectors: Callable[[Block, int], list[Value]], odd: int = 1) -> Kind:
    """Of blocks with `_eights`."""

    def scales(block: Block, step: int) -> Value:
        half, part = divmod(step, 2)
        return spread(block, block.once(_eights, odd), (4 * half + part, 4 * half + 2 + part))

    def minima(block: Block) -> Value:
        return block.once(_eights, odd)

    return Kind(256, _two(_THIRTIES, 32), vectors, scales, minima, at=range(8, 16))


def _low(block: Block, at: int, half: int) -> Value:
    return words_of(block.bytes(at + BYTES * half), block.e)


def _q4_k(block: Block, step: int) -> list[Value]:
    half, part = divmod(step, 2)
    words = block.once(_low, 16, half)
    return block.pairs(FOUR_BITS, moved(block.e, words, -4 * part))


def _q4_k_bytes(block: Block, step: int) -> list[Value]:
    """Codes of odd groups 16 times: where they lie."""
    half, part = divmod(step, 2)
    return [_masked(block.e, block.once(_low, 16, half), 0xF0 if part else 0x0F)]


def _high(block: Block, at: int, shift: int, each: int) -> Value:
    """32 bytes twice, from bit `shift` on, and `each` bits further."""
    b, packed = block.e.b, block.bytes(at, 32)
    parts = [b.lshr(packed, splat_int(I8, 32, bits)) if bits else packed
             for bits in (shift, shift + each)]  # fmt: skip
    return words_of(concat(block.e, parts), block.e)


def _q5_k(block: Block, step: int) -> list[Value]:
    e, (half, part) = block.e, divmod(step, 2)
    low = _masked(e, moved(e, block.once(_low, 48, half), -4 * part), 0x0F)
    high = _masked(e, moved(e, block.once(_high, 16, 4 * half, 2), 4 - part), 0x10)
    return block.pairs(FIVE_BITS, e.b.or_(low, high))


def _q6_k(block: Block, step: int) -> list[Value]:
    e, (half, part) = block.e, divmod(step, 2)
    low = _masked(e, moved(e, block.once(_low, 0, half), -4 * part), 0x0F)
    high = _masked(e, moved(e, block.once(_high, 128 + 32 * half, 0, 2), 4 - 4 * part), 0x30)
    return block.pairs(LESS_32, e.b.or_(low, high))


def _sixteen_scales(block: Block) -> Value:
    codes = block.e.b.sitofp(block.bytes(192, 16), vec(F32, 16))
    return block.e.b.fmul(codes, block.half(208, 16))


def _q6_k_scales(block: Block, step: int) -> Value:
    first = 4 * step
    return spread(block, block.once(_sixteen_scales), range(first, first + 4))


def _eight_scales(block: Block) -> Value:
    """Of eight groups, less 32: 4 bits each in four bytes, two in two bytes."""
    b = block.e.b

    def fields(bits: Value, each: int) -> Value:
        shifts = lanes_mask([each * group for group in range(8)])
        return b.and_(b.lshr(block.e.splat(bits, 8), shifts), isplat(2**each - 1, 8))

    high = fields(b.zext(block.load(2, I16), I32), 2)
    both = b.or_(fields(block.load(4, I32), 4), b.shl(high, isplat(4, 8)))
    codes = b.sitofp(b.sub(both, isplat(32, 8)), vec(F32, 8))
    return b.fmul(codes, block.half(0, 8))


def _iq4_xs_scales(block: Block, step: int) -> Value:
    half = step // 2
    return spread(block, block.once(_eight_scales), range(4 * half, 4 * half + 4))


def _eight_lifted(block: Block) -> Value:
    return resize(block.e, block.once(_eight_scales), LANES)


def _iq4_xs(block: Block, step: int) -> list[Value]:
    half, part = divmod(step, 2)
    words = block.once(_low, 8, half)
    return block.pairs(IQ4, moved(block.e, words, -4 * part))


def _in_places(columns: Sequence[int]) -> tuple[int, ...]:
    """Columns of the bytes in even places, then of those in odd ones."""
    return (*columns[::2], *columns[1::2])


_SIXTEENS = [32 * (byte // 16) + byte % 16 for byte in range(BYTES)]
_THIRTIES = [64 * (byte // 32) + byte % 32 for byte in range(BYTES)]


def _two(columns: Sequence[int], apart: int) -> tuple[tuple[int, ...], ...]:
    return _in_places(columns), _in_places([column + apart for column in columns])


KINDS: Mapping[str, Kind] = {
    "q8_0": Kind(32, (tuple(range(32)),), _bytes, lambda block, _: block.half(0, LANES)),
    "q4_0": _four(LESS_8, 2, _halves),
    "q4_1": _four(FOUR_BITS, 4, _halves, _added),
    "q5_0": _four(LESS_16, 6, _halves, high=2),
    "q5_1": _four(FIVE_BITS, 8, _halves, _added, high=4),
    "iq4_nl": _four(IQ4, 2, _halves),
    "ggml_mxfp4": _four(E2M1_DOUBLED, 1, _powers),
    **SMALL,
    "q4_k": _of_eight(_q4_k),
    "q5_k": _of_eight(_q5_k),
    "q6_k": Kind(
        256,
        _two(range(64), 64),
        _q6_k,
        _q6_k_scales,
        summed=16,
        least=-32,
        lifted=lambda block: block.once(_sixteen_scales),
    ),
    "iq4_xs": Kind(
        256,
        _two(_SIXTEENS, 16),
        _iq4_xs,
        _iq4_xs_scales,
        at=range(8),
        least=-127,
        lifted=_eight_lifted,
    ),
}
"""By the name of a format."""
OF_BYTES: Mapping[str, Kind] = {**KINDS, "q4_k": _of_eight(_q4_k_bytes, 16), **SMALL_OF_BYTES}
"""The same where bytes are multiplied."""
