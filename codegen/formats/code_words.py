"""Codes of a byte each as words of 16 bits, for dot products of pairs: of a vector of bytes the
words of those in even places, then of those in odd ones. So nothing moves between lanes. Where
bytes are multiplied they stay what they are.

As bf16, for panels, codes of 6 bits or fewer are looked up by `vpermw` (`vpermi2w`), which reads
the lowest bits of a word and ignores what lies above. As whole numbers they are masked, or looked
up by `vpshufb`. Without `values` codes are two's complement.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

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
    """What codes become, less their least value: `pairs(e, values, codes)` of codes `<n x i16>`,
    two a word: the words of those in even places and of those in odd ones, or one vector of bytes;
    `twos(e, low, bit)` of the codes of 2 bits that begin at a bit of the bytes of words `<n x
    i16>`; `threes(e, low, high, bit)` with third bits, which lie half as far up the bytes of words
    `high`.
    """

    pairs: Callable[[Emitter, Sequence[float], Value], list[Value]]
    twos: Callable[[Emitter, Value, int], list[Value]]
    threes: Callable[[Emitter, Value, Value, int], list[Value]]


_BYTES_OF_A_WORD = (0, 8)


def moved(e: Emitter, words: Value, left: int) -> Value:
    """Words or wider numbers moved to the left by so many bits, or to the right."""
    if left == 0:
        return words
    kind = words.type
    amount = splat_int(kind.element, kind.count, abs(left))
    return e.b.shl(words, amount) if left > 0 else e.b.lshr(words, amount)


def bf16_pairs(e: Emitter, values: Sequence[float], codes: Value) -> list[Value]:
    """Two vectors of bf16 `<32 x i16>` of 64 codes `<32 x i16>`; of `values` there are a power of
    two, 64 at most, or none.
    """
    if not values:
        return _signed_bf16(e, codes)
    table = list(values) * max(1, _WORDS // len(values))
    return [_looked_up(e, table, index) for index in (codes, moved(e, codes, -8))]


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


def _byte_twos(e: Emitter, low: Value, bit: int) -> list[Value]:
    return [_kept(e, moved(e, low, -bit), 0x0303)]


def _byte_threes(e: Emitter, low: Value, high: Value, bit: int) -> list[Value]:
    third = moved(e, high, 2 - bit // 2)
    return [e.b.or_(_kept(e, moved(e, low, -bit), 0x0303), _kept(e, third, 0x0404))]


def _whole_twos(e: Emitter, low: Value, bit: int) -> list[Value]:
    return [_kept(e, moved(e, low, -bit - byte), 3) for byte in _BYTES_OF_A_WORD]


def _whole_threes(e: Emitter, low: Value, high: Value, bit: int) -> list[Value]:
    found = []
    for byte in _BYTES_OF_A_WORD:
        third = moved(e, high, 2 - byte - bit // 2)
        found.append(e.b.or_(_kept(e, moved(e, low, -bit - byte), 3), _kept(e, third, 4)))
    return found


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


def whole_pairs(e: Emitter, values: Sequence[float], codes: Value) -> list[Value]:
    """Two vectors of whole numbers `<n x i16>` of 2 n codes `<n x i16>`; `values` are whole."""
    b, eight = e.b, splat_int(I16, codes.type.count, 8)
    if is_line(values):
        least = splat_int(I16, codes.type.count, int(values[0]))
        return [b.add(word, least) for word in _raised_pairs(e, values, codes)]
    if values:
        codes = _shuffled(e, values, _kept(e, codes, 0x0F0F))
    return [b.ashr(b.shl(codes, eight), eight), b.ashr(codes, eight)]


def _raised_pairs(e: Emitter, values: Sequence[float], codes: Value) -> list[Value]:
    """The same, less the least value: those of one that are not negative."""
    (codes,) = _byte_pairs(e, values, codes)
    return [_kept(e, codes, 255), moved(e, codes, -8)]


def _byte_pairs(e: Emitter, values: Sequence[float], codes: Value) -> list[Value]:
    """One vector of bytes, less the least value."""
    codes = _kept(e, codes, (len(values) - 1) * 0x101)
    if is_line(values):
        return [codes]
    return [_shuffled(e, [value - min(values) for value in values], codes)]


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


RAISED = Words(_raised_pairs, _whole_twos, _whole_threes)
"""As words of 16 bits."""
BYTES = Words(_byte_pairs, _byte_twos, _byte_threes)
"""As bytes, in the order of the codes."""
