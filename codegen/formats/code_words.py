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
from numpy.typing import NDArray

from hmc.codegen.ir import BF16, F32, I8, I16, Emitter, Value, vec
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
    those in even places and of those in odd ones; `signed(e, bytes)` of `<n x i8>` in two's
    complement `<n x i16>` in order.
    """

    pairs: Callable[[Emitter, Sequence[float], Value], list[Value]]
    signed: Callable[[Emitter, Value], Value]


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
    bits = [int(each) >> 16 for each in np.array(values, np.float32).view(np.uint32)]
    bits *= max(1, _WORDS // len(bits))
    tables = [
        ir.Constant(codes.type, [ir.Constant(I16, word) for word in bits[at : at + _WORDS]])
        for at in range(0, len(bits), _WORDS)
    ]
    found = []
    for index in (codes, moved(e, codes, -8)):
        if len(tables) == 1:
            name = "llvm.x86.avx512.permvar.hi.512"
            found.append(e.call(name, index.type, tables[0], index))
        else:
            name = "llvm.x86.avx512.vpermi2var.hi.512"
            found.append(e.call(name, index.type, tables[0], index, tables[1]))
    return found


def _signed_bf16(e: Emitter, codes: Value) -> list[Value]:
    """High and low bytes of the bf16 numbers of 64 codes of 8 bits, by tables of 7 bits for each
    sign; words of them are those of codes in even and in odd places.
    """
    b, kind, bytes_ = e.b, codes.type, vec(I8, 64)
    each = b.bitcast(codes, bytes_)
    negative = b.icmp_signed("<", each, splat_int(I8, 64, 0))
    bits = np.array([*range(128), *range(-128, 0)], np.float32).view(np.uint32) >> 16

    def looked_up(shift: int) -> Value:
        halves = (bits[128:] >> shift & 0xFF, bits[:128] >> shift & 0xFF)
        return b.bitcast(b.select(negative, *(_byte(e, half, each) for half in halves)), kind)

    top, low = looked_up(8), looked_up(0)
    under = splat_int(I16, 32, 0x00FF)
    return [
        b.or_(moved(e, top, 8), b.and_(low, under)),
        b.or_(b.and_(top, splat_int(I16, 32, 0xFF00)), moved(e, low, -8)),
    ]


def _byte(e: Emitter, table: NDArray[np.integer], codes: Value) -> Value:
    """Of a table of 128 bytes those that 64 codes name by their lower 7 bits (`vpermi2b`)."""
    low, high = (
        ir.Constant(codes.type, [ir.Constant(I8, int(byte)) for byte in half])
        for half in (table[:64], table[64:])
    )
    return e.call("llvm.x86.avx512.vpermi2var.qi.512", codes.type, low, codes, high)


def is_line(values: Sequence[float]) -> bool:
    """Whether values are whole numbers, each one more than the one before it."""
    return bool(values) and list(values) == [values[0] + code for code in range(len(values))]


def _whole_pairs(
    e: Emitter, values: Sequence[float], codes: Value, raised: bool = False
) -> list[Value]:
    """Two vectors of whole numbers `<n x i16>` of 2 n codes `<n x i16>`; `values` are whole. Those
    in a line begin at 0 if they are `raised`.
    """
    b, kind = e.b, codes.type
    eight = splat_int(I16, kind.count, 8)
    if values:
        least = 0 if raised else int(values[0])
        codes = b.and_(codes, splat_int(I16, kind.count, (len(values) - 1) * 0x101))
        if is_line(values):
            words = b.and_(codes, splat_int(I16, kind.count, 255)), b.lshr(codes, eight)
            more = splat_int(I16, kind.count, least)
            return [b.add(word, more) if least else word for word in words]
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


def _bf16_signed(e: Emitter, codes: Value) -> Value:
    b, count = e.b, codes.type.count // 2
    low, high = cut(e, b.sitofp(codes, vec(F32, 2 * count)), count)
    name = f"llvm.x86.avx512bf16.cvtne2ps2bf16.{32 * count}"
    return b.bitcast(e.call(name, vec(BF16, 2 * count), high, low), vec(I16, 2 * count))


def _whole_signed(e: Emitter, codes: Value) -> Value:
    return e.b.sext(codes, vec(I16, codes.type.count))


PAIRS = Words(_bf16_pairs, _bf16_signed)
"""As bf16, on tiers that multiply pairs."""
WHOLE = Words(_whole_pairs, _whole_signed)
"""As whole numbers."""
RAISED = Words(partial(_whole_pairs, raised=True), _whole_signed)
"""As whole numbers, those in a line from 0 up."""
