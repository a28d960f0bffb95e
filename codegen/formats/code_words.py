"""Codes of a byte each as words of 16 bits, for dot products of pairs: of a vector of bytes the
words of those in even places, then of those in odd ones. So nothing moves between lanes.

As bf16 codes of 6 bits or fewer are looked up by `vpermw` (`vpermi2w`), which reads the lowest bits
of a word and ignores what lies above. As whole numbers they are masked, or looked up by `vpshufb`.
Without `values` codes are two's complement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from llvmlite import ir

from hmc.codegen.formats.pairs import byte_tables
from hmc.codegen.ir import I8, I16, Emitter, Value, vec
from hmc.codegen.native import is_line
from hmc.codegen.vector import concat, cut, splat_int

TWO_BITS = (0.0, 1.0, 2.0, 3.0)
FOUR_BITS = tuple(float(code) for code in range(16))
FIVE_BITS = tuple(float(code) for code in range(32))
LESS_4 = tuple(float(code - 4) for code in range(8))
LESS_8 = tuple(float(code - 8) for code in range(16))
LESS_16 = tuple(float(code - 16) for code in range(32))
LESS_32 = tuple(float(code - 32) for code in range(64))
"""Values of codes."""

_WORDS = 32
"""Words that tables of bf16 are looked up in at once."""
_SHUFFLE = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}


@dataclass(frozen=True)
class Words:
    """What codes become: `pairs(e, values, codes)` of codes `<n x i16>`, two a word: the words of
    those in even places and of those in odd ones; `twos(e, values, low, bit)` of the codes of 2
    bits that begin at a bit of words `<n x i16>`; `threes(e, values, low, high, bit)` with third
    bits, which lie half as far up a byte of words `high`.
    """

    pairs: Callable[[Emitter, Sequence[float], Value], list[Value]]
    twos: Callable[[Emitter, Sequence[float], Value, int], Value]
    threes: Callable[[Emitter, Sequence[float], Value, Value, int], Value]


def moved(e: Emitter, words: Value, left: int) -> Value:
    """Words or wider numbers moved to the left by so many bits, or to the right."""
    if left == 0:
        return words
    kind = words.type
    amount = splat_int(kind.element, kind.count, abs(left))
    return e.b.shl(words, amount) if left > 0 else e.b.lshr(words, amount)


def _bf16_pairs(e: Emitter, values: Sequence[float], codes: Value) -> list[Value]:
    """Two vectors of bf16 `<32 x i16>` of 64 codes `<32 x i16>`; of `values` there are a power of
    two, 64 at most, or none.
    """
    if not values:
        return _signed_bf16(e, codes)
    table = list(values) * max(1, _WORDS // len(values))
    return [_looked_up(e, table, index) for index in (codes, moved(e, codes, -8))]


def _bf16_twos(e: Emitter, values: Sequence[float], low: Value, bit: int) -> Value:
    """A look-up reads 5 bits: two codes of 2 bits begin there, and each has a table."""
    below = bit % 4
    table = [values[index >> below & 3] for index in range(_WORDS)]
    return _looked_up(e, table, moved(e, low, below - bit))


def _bf16_threes(e: Emitter, values: Sequence[float], low: Value, high: Value, bit: int) -> Value:
    """A look-up of two tables reads 6 bits: two codes, then the third bits of both."""
    place, second = bit % 8 // 4 * 2, bit % 4 // 2
    lows = _kept(e, moved(e, low, -2 * place), 0x0F0F)
    highs = _kept(e, moved(e, high, 4 - place), 0x3030)
    index = moved(e, e.b.or_(lows, highs), -(bit // 8 * 8))
    table = [
        values[index >> 2 * second & 3 | (index >> 4 + second & 1) << 2]
        for index in range(2 * _WORDS)
    ]
    return _looked_up(e, table, index)


def _looked_up(e: Emitter, table: Sequence[float], index: Value) -> Value:
    """bf16 by the 5 or 6 lowest bits of words."""
    bits = [int(each) >> 16 for each in np.array(table, np.float32).view(np.uint32)]
    parts = [
        ir.Constant(index.type, [ir.Constant(I16, word) for word in bits[at : at + _WORDS]])
        for at in range(0, len(bits), _WORDS)
    ]
    if len(set(map(str, parts))) == 1:
        return e.call("llvm.x86.avx512.permvar.hi.512", index.type, parts[0], index)
    name = "llvm.x86.avx512.vpermi2var.hi.512"
    return e.call(name, index.type, parts[0], index, parts[1])


def _kept(e: Emitter, words: Value, bits: int) -> Value:
    return e.b.and_(words, splat_int(I16, words.type.count, bits))


def _whole_twos(e: Emitter, values: Sequence[float], low: Value, bit: int) -> Value:
    assert not values[0]
    return _kept(e, moved(e, low, -bit), 3)


def _whole_threes(
    e: Emitter, values: Sequence[float], low: Value, high: Value, bit: int, raised: bool = False
) -> Value:
    third = moved(e, high, 2 - bit // 8 * 8 - bit % 8 // 2)
    codes = e.b.or_(_kept(e, moved(e, low, -bit), 3), _kept(e, third, 4))
    return _above(e, codes, values, raised)


def _above(e: Emitter, codes: Value, values: Sequence[float], raised: bool) -> Value:
    """Codes as whole numbers from the first value up, or from 0 if `raised`."""
    least = 0 if raised else int(values[0])
    return e.b.add(codes, splat_int(I16, codes.type.count, least)) if least else codes


def _signed_bf16(e: Emitter, codes: Value) -> list[Value]:
    """High and low bytes of the bf16 numbers of 64 codes of 8 bits, by tables; words of them are
    those of codes in even and in odd places.
    """
    b = e.b
    numbers = np.array([*range(128), *range(-128, 0)], np.float32).view(np.uint32) >> 16
    found = byte_tables(e, numbers.tolist(), b.bitcast(codes, vec(I8, 64)))
    top, low = (b.bitcast(each, codes.type) for each in found)
    return [
        b.or_(moved(e, top, 8), _kept(e, low, 0x00FF)),
        b.or_(_kept(e, top, 0xFF00), moved(e, low, -8)),
    ]


def _whole_pairs(
    e: Emitter, values: Sequence[float], codes: Value, raised: bool = False
) -> list[Value]:
    """Two vectors of whole numbers `<n x i16>` of 2 n codes `<n x i16>`; `values` are whole. Those
    in a line begin at 0 if they are `raised`.
    """
    b, kind = e.b, codes.type
    eight = splat_int(I16, kind.count, 8)
    if values:
        codes = b.and_(codes, splat_int(I16, kind.count, (len(values) - 1) * 0x101))
        if is_line(values):
            words = _kept(e, codes, 255), b.lshr(codes, eight)
            return [_above(e, word, values, raised) for word in words]
        codes = _shuffled(e, values, codes)
    return [b.ashr(b.shl(codes, eight), eight), b.ashr(codes, eight)]


def _shuffled(e: Emitter, values: Sequence[float], codes: Value) -> Value:
    """Bytes from 0 to 15, as words, by a table; in vectors of the tier."""
    count, most = codes.type.count, 2 * e.lanes
    if count > most:
        return concat(e, [_shuffled(e, values, part) for part in cut(e, codes, most)])
    kind = vec(I8, 2 * count)
    table = [ir.Constant(I8, int(value)) for value in values] * (kind.count // len(values))
    codes_of = e.b.bitcast(codes, kind)
    found = e.call(_SHUFFLE[kind.count], kind, ir.Constant(kind, table), codes_of)
    return e.b.bitcast(found, codes.type)


PAIRS = Words(_bf16_pairs, _bf16_twos, _bf16_threes)
"""As bf16, on tiers that multiply pairs."""
WHOLE = Words(_whole_pairs, _whole_twos, _whole_threes)
"""As whole numbers."""
RAISED = Words(
    partial(_whole_pairs, raised=True),
    _whole_twos,
    partial(_whole_threes, raised=True),
)
"""As whole numbers, those in a line from 0 up."""
