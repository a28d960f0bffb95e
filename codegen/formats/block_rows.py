"""Blocks of GGUF of many rows at once, a lane each, for the panels of many-token matmuls: 128
columns of every row, as codes of a byte each and as the scales of their groups.

Bytes are transposed as they are stored: a word of 32 bits then holds four neighbouring bytes of a
row, and shifts and masks make codes of four neighbouring columns of them (`FOUR`: in which order
these come out as words of 16 bits). Scales are made of all rows together, from the bytes that they
lie in. `hmc/formats/blocks.py` says how blocks are laid out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from llvmlite import ir

from hmc.codegen.formats.code_words import (
    FIVE_BITS,
    FOUR_BITS,
    LESS_4,
    LESS_8,
    LESS_16,
    LESS_32,
    TWO_BITS,
    moved,
)
from hmc.codegen.formats.interleave import Chunk, words_of
from hmc.codegen.ir import F16, F32, I8, I16, I32, Emitter, Value, const, vec
from hmc.codegen.vector import concat, isplat, resize
from hmc.formats import Format
from hmc.formats.codebooks import E2M1_DOUBLED, IQ4

FOUR = (0, 2, 1, 3)
"""The order of four columns in a panel."""
_BYTES, _WORDS = 64, 16
_HALF = 128
_HIGH = 32
"""Bytes that hold high bits: of each the lowest belong to 32 columns, the next to 32 more."""


@dataclass(frozen=True)
class Rows:
    """128 columns or fewer of some rows: at `addresses` (i8*) the block of each that has them, or
    the first of `count` small ones, `size` bytes each; `half` (i64) of a block of 256.
    """

    e: Emitter
    addresses: list[Value]
    size: int
    count: int
    half: Value
    _made: dict[object, Value] = field(default_factory=dict)

    @staticmethod
    def of(e: Emitter, row: Format, chunk: Chunk) -> Rows:
        """Those of a chunk."""
        columns, size = row.codes.block
        moved_by = e.b.mul(e.b.udiv(chunk.k, const(columns)), const(size))
        half = e.b.udiv(e.b.urem(chunk.k, const(columns)), const(_HALF))
        addresses = [e.offset(each.codes, moved_by) for each in chunk.rows]
        return Rows(e, addresses, size, max(1, chunk.length // columns), half)

    @property
    def lanes(self) -> int:
        """Rows."""
        return len(self.addresses)

    def once(self, make: Callable[..., Value], *args: int) -> Value:
        """`make(self, *args)`, emitted where it is first asked for."""
        key = (make, *args)
        if key not in self._made:
            self._made[key] = make(self, *args)
        return self._made[key]

    def halved(self, at: int, later: int) -> Value:
        """`at`, and in the second half of a block `later` more (i64)."""
        return self.e.b.add(const(at), self.e.b.mul(self.half, const(later)))

    def splat(self, number: Value) -> Value:
        """An i64 in all lanes, as i32."""
        return self.e.splat(self.e.b.trunc(number, I32), self.lanes)

    def numbers(self, at: Value | int, kind: ir.Type) -> Value:
        """`<lanes x kind>`: what stands at byte `at` of each row's block."""
        at = const(at) if isinstance(at, int) else at
        found: Value = ir.Constant(vec(kind, self.lanes), ir.Undefined)
        for lane, address in enumerate(self.addresses):
            one = self.e.load(self.e.offset(address, at), const(0), kind)
            found = self.e.b.insert_element(found, one, ir.Constant(I32, lane))
        return found

    def floats(self, at: int) -> Value:
        """f16 numbers as f32."""
        return self.e.b.fpext(self.numbers(at, F16), vec(F32, self.lanes))

    def fours(self, pieces: Sequence[Value], size: int) -> list[Value]:
        """Transposed: `<lanes x i32>`, four bytes of each row after four others, of the `size`
        bytes that stand from each of `pieces` (i64) on, 64 in all; after the last anything.
        """
        rows = []
        for address in self.addresses:
            parts = [self.e.load_vec(address, at, I8, size) for at in pieces]
            parts += [self.e.zeros(I8, size)] * (-len(parts) % 2 if len(parts) > 1 else 0)
            whole = resize(self.e, concat(self.e, parts), _BYTES)
            rows.append(self.e.b.bitcast(whole, vec(I32, _WORDS)))
        return words_of(self.e, rows)

    def small(self, at: int, size: int) -> Iterator[list[Value]]:
        """`fours` of the `size` bytes from `at` on of each small block, 64 after 64."""
        each = _BYTES // size
        for first in range(0, self.count, each):
            last = min(first + each, self.count)
            yield self.fours([const(n * self.size + at) for n in range(first, last)], size)


Codes = Callable[[Rows], Iterator[tuple[int, Value]]]
"""Of every four columns the first, and `<lanes x i32>`: their codes, a byte each."""


@dataclass(frozen=True)
class Kind:
    """How panels are made of blocks of a format: what `codes` are worth (empty: two's complement),
    scales of a `group` of columns and what is added to each of its weights: `<lanes x float>`.
    """

    group: int
    values: tuple[float, ...]
    codes: Codes
    scales: Callable[[Rows, int], Value]
    minima: Callable[[Rows, int], Value] | None = None


# -- codes -----------------------------------------------------------------------------------------


def _bytes(rows: Rows) -> Iterator[tuple[int, Value]]:
    for number, fours in enumerate(rows.small(2, 32)):
        for place, four in enumerate(fours):
            if _BYTES * number + 4 * place < 32 * rows.count:
                yield _BYTES * number + 4 * place, four


def _halves(e: Emitter, fours: list[Value], run: int) -> Iterator[tuple[int, Value]]:
    """Of every `run` bytes the low halves, then the high ones; anything above them."""
    for place, four in enumerate(fours):
        turn, byte = divmod(4 * place, run)
        for part in range(2):
            yield 2 * run * turn + run * part + byte, moved(e, four, -4 * part)


def _small(at: int) -> Codes:
    """16 bytes from `at` on of each block of 32."""

    def codes(rows: Rows) -> Iterator[tuple[int, Value]]:
        (fours,) = rows.small(at, 16)
        for column, four in _halves(rows.e, fours, 16):
            if column < 32 * rows.count:
                yield column, four

    return codes


def _large(at: int, run: int) -> Codes:
    """Of a block of 256 the 64 bytes of a half, the first of which stand from `at` on."""

    def codes(rows: Rows) -> Iterator[tuple[int, Value]]:
        fours = rows.fours([rows.halved(at, _BYTES)], _BYTES)
        return _halves(rows.e, fours, run)

    return codes


def _quarters(at: int) -> Codes:
    """Codes of 2 bits: of each of 32 bytes the lowest, then the next ones; anything above them."""

    def codes(rows: Rows) -> Iterator[tuple[int, Value]]:
        fours = rows.fours([rows.halved(at, _HIGH)], _HIGH)[: _HIGH // 4]
        for place, four in enumerate(fours):
            for part in range(4):
                yield _HIGH * part + 4 * place, moved(rows.e, four, -2 * part)

    return codes


def _with(low: Codes, at: int, each: int, bits: int = 4) -> Codes:
    """And above `bits` of them `each` high ones, from byte `at` on."""
    bytes_, columns = divmod(_HALF, 8 // each * _HIGH)

    def codes(rows: Rows) -> Iterator[tuple[int, Value]]:
        e, b = rows.e, rows.e.b
        below, above = (
            isplat(value * 0x01010101, rows.lanes) for value in (2**bits - 1, (2**each - 1) << bits)
        )
        fours = rows.fours([rows.halved(at, bytes_ * _HIGH)], _HIGH)
        first = rows.splat(rows.halved(0, columns // _HIGH * each))
        for column, four in low(rows):
            turn, byte = divmod(column, _HIGH)
            high = b.lshr(fours[byte // 4], first) if columns else fours[byte // 4]
            high = b.and_(moved(e, high, bits - turn * each), above)
            yield column, b.or_(b.and_(four, below), high)

    return codes


def _word(rows: Rows, at: int) -> Value:
    return rows.numbers(at, I32)


def _with_flags(low: Codes, at: int) -> Codes:
    """And a fifth bit each, those of a small block in the four bytes from `at` on. A product brings
    four neighbouring bits into the places that they have in four bytes.
    """

    def codes(rows: Rows) -> Iterator[tuple[int, Value]]:
        b, lanes = rows.e.b, rows.lanes
        for column, four in low(rows):
            block, place = divmod(column, 32)
            bits = moved(rows.e, rows.once(_word, block * rows.size + at), -place)
            high = b.mul(b.and_(bits, isplat(15, lanes)), isplat(0x02040810, lanes))
            high = b.and_(high, isplat(0x10101010, lanes))
            yield column, b.or_(b.and_(four, isplat(0x0F0F0F0F, lanes)), high)

    return codes


# -- scales ----------------------------------------------------------------------------------------


def _own(rows: Rows, group: int) -> Value:
    """The f16 number at byte 0 of each small block."""
    return rows.floats(group * rows.size)


def _added(rows: Rows, group: int) -> Value:
    """The one at byte 2."""
    return rows.floats(group * rows.size + 2)


def _powers(rows: Rows, group: int) -> Value:
    """Half of the power of two whose exponent is byte 0; the first two are subnormal."""
    b, lanes = rows.e.b, rows.lanes
    exponent = b.zext(rows.numbers(group * rows.size, I8), vec(I32, lanes))
    small = b.shl(isplat(0x00200000, lanes), exponent)
    power = b.shl(b.sub(exponent, isplat(1, lanes)), isplat(23, lanes))
    few = b.icmp_unsigned("<", exponent, isplat(2, lanes))
    return b.bitcast(b.select(few, small, power), vec(F32, lanes))


def _factor(rows: Rows, at: int) -> Value:
    return rows.floats(at)


def _six_bits(rows: Rows, minima: int) -> Value:
    """A byte each: the four scales (or minima) of a half."""
    e, b, lanes = rows.e, rows.e.b, rows.lanes
    low, last = rows.numbers(8 if minima else 4, I32), rows.numbers(12, I32)
    top = b.shl(b.and_(moved(e, low, -6), isplat(0x03030303, lanes)), isplat(4, lanes))
    rest = b.and_(moved(e, last, -4 if minima else 0), isplat(0x0F0F0F0F, lanes))
    is_first = b.icmp_unsigned("==", rows.half, const(0))
    return b.select(is_first, b.and_(low, isplat(0x3F3F3F3F, lanes)), b.or_(rest, top))


def _byte(rows: Rows, words: Value, number: int) -> Value:
    """Bytes of words, in two's complement, as f32."""
    up = moved(rows.e, words, 24 - 8 * number)
    return rows.e.b.sitofp(rows.e.b.ashr(up, isplat(24, rows.lanes)), vec(F32, rows.lanes))


def _k_scales(rows: Rows, group: int) -> Value:
    codes = _byte(rows, rows.once(_six_bits, 0), group)
    return rows.e.b.fmul(codes, rows.once(_factor, 0))


def _k_minima(rows: Rows, group: int) -> Value:
    codes = _byte(rows, rows.once(_six_bits, 1), group)
    return rows.e.b.fneg(rows.e.b.fmul(codes, rows.once(_factor, 2)))


def _q6_words(rows: Rows, number: int) -> Value:
    return rows.numbers(rows.halved(192 + 4 * number, 8), I32)


def _q6_scales(rows: Rows, group: int) -> Value:
    codes = _byte(rows, rows.once(_q6_words, group // 4), group % 4)
    return rows.e.b.fmul(codes, rows.once(_factor, 208))


def _q2_words(rows: Rows, number: int) -> Value:
    return rows.numbers(rows.halved(4 * number, 8), I32)


def _q2(rows: Rows, group: int, bits: int, factor: int) -> Value:
    """Four bits of a byte from bit `bits` on, times the factor at a byte."""
    b, lanes = rows.e.b, rows.lanes
    words = moved(rows.e, rows.once(_q2_words, group // 4), -8 * (group % 4) - bits)
    codes = b.sitofp(b.and_(words, isplat(15, lanes)), vec(F32, lanes))
    return b.fmul(codes, rows.once(_factor, factor))


def _q2_scales(rows: Rows, group: int) -> Value:
    return _q2(rows, group, 0, 80)


def _q2_minima(rows: Rows, group: int) -> Value:
    return rows.e.b.fneg(_q2(rows, group, 4, 82))


def _q3_words(rows: Rows, at: int) -> Value:
    """Four bytes from `at` on; of the second half 4 bits further."""
    return rows.e.b.lshr(rows.numbers(at, I32), rows.splat(rows.halved(0, 4)))


def _q3_scales(rows: Rows, group: int) -> Value:
    e, b, lanes = rows.e, rows.e.b, rows.lanes
    turn, byte = divmod(group, 4)
    low = moved(e, rows.once(_q3_words, 96 + 4 * turn), -8 * byte)
    high = moved(e, rows.once(_q3_words, 104), 4 - 8 * byte - 2 * turn)
    codes = b.or_(b.and_(low, isplat(15, lanes)), b.and_(high, isplat(48, lanes)))
    codes = b.sub(codes, isplat(32, lanes))
    return b.fmul(b.sitofp(codes, vec(F32, lanes)), rows.once(_factor, 108))


def _iq4_words(rows: Rows, number: int) -> Value:
    """Low (0) or high bits of the scales of a half, the first of them lowest."""
    b = rows.e.b
    if number == 0:
        return b.lshr(rows.numbers(4, I32), rows.splat(rows.halved(0, 16)))
    high = b.zext(rows.numbers(2, I16), vec(I32, rows.lanes))
    return b.lshr(high, rows.splat(rows.halved(0, 8)))


def _iq4_scales(rows: Rows, group: int) -> Value:
    e, b, lanes = rows.e, rows.e.b, rows.lanes
    low = b.and_(moved(e, rows.once(_iq4_words, 0), -4 * group), isplat(15, lanes))
    high = b.and_(moved(e, rows.once(_iq4_words, 1), 4 - 2 * group), isplat(48, lanes))
    codes = b.sub(b.or_(low, high), isplat(32, lanes))
    return b.fmul(b.sitofp(codes, vec(F32, lanes)), rows.once(_factor, 0))


KINDS: Mapping[str, Kind] = {
    "q8_0": Kind(32, (), _bytes, _own),
    "q4_0": Kind(32, LESS_8, _small(2), _own),
    "q4_1": Kind(32, FOUR_BITS, _small(4), _own, _added),
    "q5_0": Kind(32, LESS_16, _with_flags(_small(6), 2), _own),
    "q5_1": Kind(32, FIVE_BITS, _with_flags(_small(8), 4), _own, _added),
    "iq4_nl": Kind(32, IQ4, _small(2), _own),
    "ggml_mxfp4": Kind(32, E2M1_DOUBLED, _small(1), _powers),
    "q2_k": Kind(16, TWO_BITS, _quarters(16), _q2_scales, _q2_minima),
    "q3_k": Kind(16, LESS_4, _with(_quarters(32), 0, 1, 2), _q3_scales),
    "q4_k": Kind(32, FOUR_BITS, _large(16, 32), _k_scales, _k_minima),
    "q5_k": Kind(32, FIVE_BITS, _with(_large(48, 32), 16, 1), _k_scales, _k_minima),
    "q6_k": Kind(16, LESS_32, _with(_large(0, 64), 128, 2), _q6_scales),
    "iq4_xs": Kind(32, IQ4, _large(8, 16), _iq4_scales),
}
"""By the name of a format."""
