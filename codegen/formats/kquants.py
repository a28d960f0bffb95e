"""Blocks of GGUF as words of 16 bits and their scales, for dot products of a few tokens: codes are
whole numbers (or entries of a table) that bf16 holds exactly. `hmc/formats/blocks.py` says how
blocks are laid out.

Codes of 4 to 6 bits stand a byte each in a vector, as they lie in the block: of half a block (or of
four blocks of 32) the low halves of 64 bytes, then the high ones. Words of them are those of
codes in even and odd places (code_words.py): the order that activations are brought into
(block_dot.py), so nothing else moves between lanes, and a scale covers whole f32 lanes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
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
    Words,
    is_line,
    moved,
)
from hmc.codegen.ir import (
    F16,
    F32,
    I1,
    I8,
    I16,
    I32,
    I64,
    Emitter,
    Value,
    const,
    lanes_mask,
    vec,
)
from hmc.codegen.vector import concat, isplat, splat_int
from hmc.formats.codebooks import E2M1_DOUBLED, IQ4

LANES, WORDS, BYTES = 16, 32, 64
"""f32, bf16 and codes of a vector."""


@dataclass(frozen=True)
class Block:
    """What lies at `address` (i8*): a block of 256 columns, or `count` of 32, `size` bytes each;
    codes become `words`.
    """

    e: Emitter
    words: Words
    address: Value
    count: int
    size: int
    _made: dict[object, Value] = field(default_factory=dict)

    def once(self, make: Callable[..., Value], *args: int) -> Value:
        """`make(self, *args)`, emitted where it is first asked for."""
        key = (make, *args)
        if key not in self._made:
            self._made[key] = make(self, *args)
        return self._made[key]

    def pairs(self, values: Sequence[float], codes: Value) -> list[Value]:
        """Words of 64 codes: of those in even places, then of those in odd ones."""
        return self.words.pairs(self.e, values, codes)

    def load(self, at: int, kind: ir.Type) -> Value:
        """The number at byte `at`."""
        return self.e.load(self.e.offset(self.address, const(at)), const(0), kind)

    def half(self, at: int, lanes: int) -> Value:
        """The f16 number at byte `at`, as f32 in all lanes."""
        return self.e.splat(self.e.b.fpext(self.load(at, F16), F32), lanes)

    def bytes(self, at: int, count: int = BYTES) -> Value:
        """`<count x i8>`."""
        return self.e.load_vec(self.address, const(at), I8, count)

    def each(self, at: int, kind: ir.IntType) -> Value:
        """`<16 x kind>`: what stands at byte `at` of each of four blocks of 32, in the four lanes
        of its codes; 0 for blocks that are not there.
        """
        found: Value = self.e.zeros(kind, LANES)
        for number in range(self.count):
            mask = ir.Constant(vec(I1, LANES), [int(lane // 4 == number) for lane in range(LANES)])
            one = self.e.splat(self.load(number * self.size + at, kind), LANES)
            found = self.e.b.select(mask, one, found)
        return found

    def sixteens(self, at: int) -> Value:
        """`<64 x i8>`: the 16 bytes from `at` on of each of four blocks of 32."""
        none = self.e.zeros(I8, 16)
        starts = [number * self.size + at for number in range(self.count)]
        parts = [self.bytes(start, 16) for start in starts] + [none] * (4 - self.count)
        return concat(self.e, parts)


@dataclass(frozen=True)
class Kind:
    """How blocks of a format are multiplied: `unit` columns at once, by steps, each of some vectors
    of codes that share the vector of scales.

    `columns[step]`: the column of each code of the step in the order of its vectors; in longer
    units the steps repeat. `vectors(block, step)`: `<32 x i16>`.
    `scales(block, step)`: `<16 x float>`. `minima(block)`: `<16 x float>`, of each `summed`
    columns, what is added to each, from lane `minima_at` on. `least` is what code 0 means, of codes
    that are whole numbers in a line.
    """

    unit: int
    columns: tuple[tuple[int, ...], ...]
    vectors: Callable[[Block, int], list[Value]]
    scales: Callable[[Block, int], Value]
    minima: Callable[[Block], Value] | None = None
    summed: int = 32
    minima_at: int = 0
    least: int = 0

    @property
    def period(self) -> int:
        """Columns after which the steps repeat."""
        return sum(map(len, self.columns))

    @property
    def steps(self) -> int:
        """In a unit."""
        return self.unit // self.period * len(self.columns)


def least_of(values: Sequence[float]) -> int:
    """What code 0 means of codes that are whole numbers in a line, else 0."""
    return int(values[0]) if is_line(values) else 0


def _words(codes: Value, e: Emitter) -> Value:
    return e.b.bitcast(codes, vec(I16, WORDS))


def _masked(e: Emitter, words: Value, byte: int) -> Value:
    return e.b.and_(words, splat_int(I16, WORDS, byte * 0x101))


def _spread(block: Block, scales: Value, groups: Sequence[int]) -> Value:
    """`<16 x float>`: of `scales` the one of each group, in as many lanes each as there are."""
    mask = lanes_mask([groups[lane * len(groups) // LANES] for lane in range(LANES)])
    return block.e.b.shuffle_vector(scales, ir.Constant(scales.type, ir.Undefined), mask)


# -- blocks of 32 ----------------------------------------------------------------------------------


def _halves(block: Block, step: int) -> Value:
    """Of each of four blocks the f16 number at byte 0."""
    halves = block.e.b.bitcast(block.each(0, I16), vec(F16, LANES))
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
    return _words(found, block.e)


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
        e, words, found = block.e, _words(block.sixteens(at), block.e), []
        for part in range(2):
            codes = moved(e, words, -4 * part)
            if high is not None:
                codes = e.b.or_(_masked(e, codes, 0x0F), _fifths(block, high + 2 * part))
            found += block.pairs(values, codes)
        return found

    columns = _in_places(_SIXTEENS) + _in_places([column + 16 for column in _SIXTEENS])
    return Kind(128, (columns,), vectors, scales, minima, least=least_of(values))


def _added(block: Block) -> Value:
    """Of each of four blocks the f16 number at byte 2, in the first lanes."""
    firsts = lanes_mask([0, 4, 8, 12, *[LANES] * (LANES - 4)])
    halves = block.e.b.shuffle_vector(block.each(2, I16), block.e.zeros(I16, LANES), firsts)
    return block.e.b.fpext(block.e.b.bitcast(halves, vec(F16, LANES)), vec(F32, LANES))


def _bytes(block: Block, step: int) -> list[Value]:
    return [block.words.signed(block.e, block.bytes(2, WORDS))]


# -- blocks of 256: steps of the low and the high halves of 64 bytes, twice ------------------------


def _eights(block: Block) -> Value:
    """Of eight groups the scales, then of each what is added: codes of 6 bits, the lower ones of
    which lie in 4 bytes each, the upper ones in nibbles of 4 bytes and the top bits of the lower.
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
    halves = b.fpext(b.bitcast(block.load(0, I32), vec(F16, 2)), vec(F32, 2))
    signed = b.fmul(halves, ir.Constant(vec(F32, 2), [1.0, -1.0]))
    return b.fmul(codes, _spread(block, signed, (0, 1)))


def _q2_k(block: Block, step: int) -> list[Value]:
    """Both bytes of a word of 64 have a code at each second bit."""
    low, twos = block.once(_low, 16, 0), block.words.twos
    return [twos(block.e, TWO_BITS, low, byte + 2 * step) for byte in (0, 8)]


def _q2(block: Block, bits: int, factor: int) -> Value:
    """Sixteen codes of 4 bits, from bit `bits` of a byte on, times the factor at a byte."""
    b = block.e.b
    codes = b.and_(b.lshr(block.bytes(0, 16), splat_int(I8, 16, bits)), splat_int(I8, 16, 15))
    return b.fmul(b.uitofp(codes, vec(F32, 16)), block.half(factor, 16))


def _q2_k_scales(block: Block, step: int) -> Value:
    return _spread(block, block.once(_q2, 0, 80), _small_groups(step))


def _q2_k_minima(block: Block) -> Value:
    return block.e.b.fneg(_q2(block, 4, 82))


def _q3_k(block: Block, step: int) -> list[Value]:
    low, high, threes = block.once(_low, 32, 0), block.once(_thirds), block.words.threes
    return [threes(block.e, LESS_4, low, high, byte + 2 * step) for byte in (0, 8)]


def _thirds(block: Block) -> Value:
    """The third bits of step s at bit s of each byte: those of the second half are behind."""
    e = block.e
    bits = _words(concat(e, [block.bytes(0, 32)] * 2), e)
    half = ir.Constant(bits.type, [I16(4 * (word // 16)) for word in range(WORDS)])
    return e.b.lshr(bits, half)


def _q3_scales(block: Block) -> Value:
    e, b = block.e, block.e.b

    def fields(at: int, kind: ir.IntType, each: int) -> Value:
        """The lowest `each` bits of the bytes of a number, then the next ones, and so on."""
        shifts = [kind(bits) for bits in range(0, 8, each)]
        some = e.splat(block.load(at, kind), len(shifts))
        some = b.lshr(some, ir.Constant(some.type, shifts))
        return b.and_(b.bitcast(some, vec(I8, 16)), splat_int(I8, 16, 2**each - 1))

    both = b.or_(fields(96, I64, 4), b.shl(fields(104, I32, 2), splat_int(I8, 16, 4)))
    codes = b.sitofp(b.sub(both, splat_int(I8, 16, 32)), vec(F32, 16))
    return b.fmul(codes, block.half(108, 16))


def _q3_k_scales(block: Block, step: int) -> Value:
    return _spread(block, block.once(_q3_scales), _small_groups(step))


def _group_scales(block: Block, step: int) -> Value:
    half, part = divmod(step, 2)
    return _spread(block, block.once(_eights), (4 * half + part, 4 * half + 2 + part))


def _eight_minima(block: Block) -> Value:
    return block.once(_eights)


def _low(block: Block, at: int, half: int) -> Value:
    return _words(block.bytes(at + BYTES * half), block.e)


def _q4_k(block: Block, step: int) -> list[Value]:
    half, part = divmod(step, 2)
    words = block.once(_low, 16, half)
    return block.pairs(FOUR_BITS, moved(block.e, words, -4 * part))


def _high(block: Block, at: int, shift: int, each: int) -> Value:
    """32 bytes twice, from bit `shift` on, and `each` bits further."""
    b, packed = block.e.b, block.bytes(at, 32)
    parts = [b.lshr(packed, splat_int(I8, 32, bits)) if bits else packed
             for bits in (shift, shift + each)]  # fmt: skip
    return _words(concat(block.e, parts), block.e)


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
    return _spread(block, block.once(_sixteen_scales), range(first, first + 4))


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
    return _spread(block, block.once(_eight_scales), range(4 * half, 4 * half + 4))


def _iq4_xs(block: Block, step: int) -> list[Value]:
    half, part = divmod(step, 2)
    words = block.once(_low, 8, half)
    return block.pairs(IQ4, moved(block.e, words, -4 * part))


def _in_places(columns: Sequence[int]) -> tuple[int, ...]:
    """Columns of the bytes in even places, then of those in odd ones."""
    return (*columns[::2], *columns[1::2])


def _small_columns(step: int) -> tuple[int, ...]:
    """Of codes of 2 and 3 bits: even places of 32 columns of both halves, then the odd ones."""
    places = [128 * (word // 16) + 32 * step + 2 * (word % 16) for word in range(WORDS)]
    return (*places, *(place + 1 for place in places))


def _small_groups(step: int) -> list[int]:
    """The 16 columns that each lane is of."""
    return [column // 16 for column in _small_columns(step)[:WORDS:2]]


_SIXTEENS = [32 * (byte // 16) + byte % 16 for byte in range(BYTES)]
_THIRTIES = [64 * (byte // 32) + byte % 32 for byte in range(BYTES)]


_SMALL = tuple(_small_columns(step) for step in range(4))


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
    "q2_k": Kind(256, _SMALL, _q2_k, _q2_k_scales, _q2_k_minima, 16),
    "q3_k": Kind(256, _SMALL, _q3_k, _q3_k_scales, least=-4),
    "q4_k": Kind(256, _two(_THIRTIES, 32), _q4_k, _group_scales, _eight_minima, minima_at=8),
    "q5_k": Kind(256, _two(_THIRTIES, 32), _q5_k, _group_scales, _eight_minima, minima_at=8),
    "q6_k": Kind(256, _two(range(64), 64), _q6_k, _q6_k_scales, least=-32),
    "iq4_xs": Kind(256, _two(_SIXTEENS, 16), _iq4_xs, _iq4_xs_scales),
}
"""By the name of a format."""
