"""Codes to whole numbers of 16 bits, for tiers that multiply these (whole.py): shifts, masks, a
byte shuffle. One class a kind of code; `word_codes` chooses, by what the row says of them.

    Nibbles    4 bits, whole numbers in a line: the code as it is, `least` less than its value
    Table      4 bits, values that are whole when doubled (E2M1): looked up by `vpshufb`
    Bytes      8 bits, a line: the code, `least` less than its value
    Signed     8 bits, two's complement
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

from llvmlite import ir

from hmc.codegen.ir import I8, I16, I32, Emitter, Value, const, vec
from hmc.codegen.native import is_line
from hmc.codegen.vector import isplat, masked_vec, splat_int
from hmc.formats import Format

_SHUFFLE = {32: "llvm.x86.avx2.pshuf.b", 64: "llvm.x86.avx512.pshuf.b.512"}


@dataclass(frozen=True)
class WordCodes:
    """How the codes of a format become vectors of `2 * lanes` words of 16 bits.

    `steps` vectors are decoded together. A value is a decoded number and `least`, times `factor`.
    Of rows that have been transposed a stored word of 32 bits holds `word` weights.
    """

    row: Format
    lanes: int
    steps: ClassVar[int] = 4
    word: ClassVar[int] = 8
    factor: ClassVar[float] = 1.0

    @property
    def width(self) -> int:
        """Weights in a vector."""
        return 2 * self.lanes

    @property
    def least(self) -> int:
        """What code 0 is worth."""
        return int(self.row.values[0])

    @property
    def order(self) -> list[int]:
        """Which weight of a unit each lane of its vectors, laid end to end, holds."""
        steps = self.steps
        return [steps * word + place for place in range(steps) for word in range(self.width)]

    def load(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """The unit at element `k` as `<width x i16>`, of which `valid` weights are read; zeros
        behind them.
        """
        return _words(e, self.row, base, k, I16, self.width, valid)

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """What `load` loaded: nibble 0 of every word, nibble 1, 2, 3."""
        b, mask = e.b, splat_int(I16, self.width, 15)
        shifted = [b.lshr(codes, splat_int(I16, self.width, 4 * at)) for at in range(1, 4)]
        return [b.and_(nibble, mask) for nibble in (codes, *shifted[:-1])] + shifted[-1:]

    def columns(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """Stored words `<lanes x i32>` from element `k` on, of which `valid` weights are read."""
        return _words(e, self.row, base, k, I32, self.lanes, valid)

    def pairs(self, e: Emitter, words: Value) -> Iterator[Value]:
        """`<lanes x i32>` of stored words of rows to pairs of neighbours of a row, `least` less
        than values.
        """
        b, lanes = e.b, self.lanes
        for pair in range(self.word // 2):
            low = b.lshr(words, isplat(8 * pair, lanes)) if pair else words
            high = b.and_(b.shl(low, isplat(12, lanes)), isplat(0xF0000, lanes))
            yield b.or_(b.and_(low, isplat(0xF, lanes)), high)


class Nibbles(WordCodes):
    """Codes of 4 bits."""


class Table(WordCodes):
    """Codes of 4 bits whose values are halves."""

    factor = 0.5

    @property
    def least(self) -> int:
        """Decoded numbers are whole."""
        return 0

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """Bytes first, lower and upper nibbles; then words of them, with their signs."""
        b, kind, eight = e.b, codes.type, splat_int(I16, self.width, 8)
        mask, found = splat_int(I16, self.width, 0x0F0F), []
        for nibbles in (codes, b.lshr(codes, splat_int(I16, self.width, 4))):
            both = b.bitcast(self._looked_up(e, b.and_(nibbles, mask)), kind)
            found.append([b.ashr(b.shl(both, eight), eight), b.ashr(both, eight)])
        (first, third), (second, fourth) = found
        return [first, second, third, fourth]

    def pairs(self, e: Emitter, words: Value) -> Iterator[Value]:
        """Bytes of numbers, then words with their signs."""
        b, kind, eight = e.b, vec(I16, self.width), splat_int(I16, self.width, 8)
        for pair in super().pairs(e, words):
            both = b.bitcast(self._looked_up(e, pair), kind)
            yield b.bitcast(b.ashr(b.shl(both, eight), eight), words.type)

    def _looked_up(self, e: Emitter, nibbles: Value) -> Value:
        """What bytes from 0 to 15 are worth, doubled."""
        kind = vec(I8, 2 * self.width)
        values = [ir.Constant(I8, int(2 * value)) for value in self.row.values]
        table = ir.Constant(kind, values * (self.width // 8))
        return e.call(_SHUFFLE[kind.count], kind, table, e.b.bitcast(nibbles, kind))


class Bytes(WordCodes):
    """Codes of 8 bits."""

    steps = 1
    word = 4

    def load(self, e: Emitter, base: Value, k: Value, valid: int) -> Value:
        """A vector's worth of bytes."""
        return masked_vec(e, base, k, I8, self.width, valid)

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """In order."""
        return [e.b.zext(codes, vec(I16, self.width))]

    def pairs(self, e: Emitter, words: Value) -> Iterator[Value]:
        """Bytes 0 and 1, bytes 2 and 3."""
        b, lanes = e.b, self.lanes
        for low in (words, b.lshr(words, isplat(16, lanes))):
            high = b.and_(b.shl(low, isplat(8, lanes)), isplat(0xFF0000, lanes))
            yield b.or_(b.and_(low, isplat(0xFF, lanes)), high)


class Signed(Bytes):
    """Codes of 8 bits that are negative where their upper bit is set."""

    @property
    def least(self) -> int:
        """Decoded numbers are what they are worth."""
        return 0

    def decode(self, e: Emitter, codes: Value) -> list[Value]:
        """In order."""
        return [e.b.sext(codes, vec(I16, self.width))]

    def pairs(self, e: Emitter, words: Value) -> Iterator[Value]:
        """With their signs."""
        b, eight = e.b, splat_int(I16, self.width, 8)
        for pair in super().pairs(e, words):
            both = b.shl(b.bitcast(pair, vec(I16, self.width)), eight)
            yield b.bitcast(b.ashr(both, eight), words.type)


def _words(
    e: Emitter, row: Format, base: Value, k: Value, element: ir.IntType, count: int, valid: int
) -> Value:
    """`<count x element>` from weight `k` on, of which `valid` weights are read: to the byte, but
    of rows that are whole words of 32 bits to the word.
    """
    each = element.width // row.code_bits
    if valid % each and row.codes.dtypes[0] != "I32":
        start = e.offset(base, e.b.udiv(k, const(8 // row.code_bits)))
        size = count * element.width // 8
        raw = masked_vec(e, start, const(0), I8, size, -(-valid * row.code_bits // 8))
        return e.b.bitcast(raw, vec(element, count))
    return masked_vec(e, base, e.b.udiv(k, const(each)), element, count, -(-valid // each))


def word_codes(row: Format, lanes: int) -> WordCodes:
    """Those of a format that is multiplied in whole numbers."""
    if row.code_bits == 8:
        return (Bytes if is_line(row.values) else Signed)(row, lanes)
    return (Nibbles if is_line(row.values) else Table)(row, lanes)
