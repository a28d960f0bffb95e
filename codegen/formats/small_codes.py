"""Q2_K and Q3_K: codes of 2 and 3 bits, four of them under each other in a byte, 64 bytes a block.

Words of 64 bytes are looked up (code_words.py) at each second bit of both bytes, so a vector has
codes of both halves of the block, and four vectors of scales are spread over their lanes.
"""

from __future__ import annotations

from collections.abc import Mapping

from llvmlite import ir

from hmc.codegen.formats.block_kind import LANES, WORDS, Block, Kind, spread, words_of
from hmc.codegen.formats.code_words import LESS_4, TWO_BITS
from hmc.codegen.ir import F32, I8, I16, I32, I64, Value, vec
from hmc.codegen.vector import concat, splat_int


def _bytes(block: Block, at: int) -> Value:
    return words_of(block.bytes(at), block.e)


def _q2_k(block: Block, step: int) -> list[Value]:
    """Both bytes of a word of 64 have a code at each second bit."""
    low, twos = block.once(_bytes, 16), block.words.twos
    return [twos(block.e, TWO_BITS, low, byte + 2 * step) for byte in (0, 8)]


def _q2(block: Block, bits: int, factor: int) -> Value:
    """Sixteen codes of 4 bits, from bit `bits` of a byte on, times the factor at a byte."""
    b = block.e.b
    codes = b.and_(b.lshr(block.bytes(0, 16), splat_int(I8, 16, bits)), splat_int(I8, 16, 15))
    return b.fmul(b.uitofp(codes, vec(F32, LANES)), block.half(factor, 16))


def _q2_k_scales(block: Block, step: int) -> Value:
    return spread(block, block.once(_q2, 0, 80), _small_groups(step))


def _q2_k_minima(block: Block) -> Value:
    return block.e.b.fneg(_q2(block, 4, 82))


def _q3_k(block: Block, step: int) -> list[Value]:
    low, high, threes = block.once(_bytes, 32), block.once(_thirds), block.words.threes
    return [threes(block.e, LESS_4, low, high, byte + 2 * step) for byte in (0, 8)]


def _thirds(block: Block) -> Value:
    """The third bits of step s at bit s of each byte: those of the second half are behind."""
    e = block.e
    bits = words_of(concat(e, [block.bytes(0, 32)] * 2), e)
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
    codes = b.sitofp(b.sub(both, splat_int(I8, 16, 32)), vec(F32, LANES))
    return b.fmul(codes, block.half(108, 16))


def _q3_k_scales(block: Block, step: int) -> Value:
    return spread(block, block.once(_q3_scales), _small_groups(step))


def _small_columns(step: int) -> tuple[int, ...]:
    """Of codes of 2 and 3 bits: even places of 32 columns of both halves, then the odd ones."""
    places = [128 * (word // 16) + 32 * step + 2 * (word % 16) for word in range(WORDS)]
    return (*places, *(place + 1 for place in places))


def _small_groups(step: int) -> list[int]:
    """The 16 columns that each lane is of."""
    return [column // 16 for column in _small_columns(step)[:WORDS:2]]


_SMALL = tuple(_small_columns(step) for step in range(4))

SMALL: Mapping[str, Kind] = {
    "q2_k": Kind(256, _SMALL, _q2_k, _q2_k_scales, _q2_k_minima, 16),
    "q3_k": Kind(256, _SMALL, _q3_k, _q3_k_scales, least=-4),
}
"""By the name of a format."""
