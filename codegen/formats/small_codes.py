"""Q2_K and Q3_K: codes of 2 and 3 bits, four of them under each other in a byte, 64 bytes a block.

Each second bit of 64 bytes begins a vector of codes of both halves of the block (code_words.py),
and four vectors of scales are spread over their lanes; or, where bytes are multiplied, Q2_K's codes
are multiplied by their scales first, by a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from llvmlite import ir

from hmc.codegen.formats.block_kind import BYTES, LANES, WORDS, Block, Kind, spread, words_of
from hmc.codegen.ir import F32, I8, I16, I32, I64, Value, lanes_mask, vec
from hmc.codegen.vector import concat, splat_int


def _bytes(block: Block, at: int) -> Value:
    return words_of(block.bytes(at), block.e)


def _q2_k(block: Block, step: int) -> list[Value]:
    """Each byte has a code at each second bit."""
    return block.words.twos(block.e, block.once(_bytes, 16), 2 * step)


def _fours(block: Block, bits: int) -> Value:
    """Sixteen codes of 4 bits, from bit `bits` of a byte on."""
    b = block.e.b
    return b.and_(b.lshr(block.bytes(0, 16), splat_int(I8, 16, bits)), splat_int(I8, 16, 15))


def _q2(block: Block, bits: int, factor: int) -> Value:
    """Those times the factor at a byte."""
    codes = block.e.b.uitofp(_fours(block, bits), vec(F32, LANES))
    return block.e.b.fmul(codes, block.half(factor, 16))


def _q2_k_scales(block: Block, step: int) -> Value:
    return spread(block, block.once(_q2, 0, 80), _small_groups(step))


def _q2_k_products(block: Block, step: int) -> list[Value]:
    """Codes times scales: of 2 and of 4 bits, products are looked up by both."""
    e, b, found = block.e, block.e.b, list[Value]()
    scales = b.shl(_fours(block, 0), splat_int(I8, 16, 2))
    kind = vec(I8, BYTES)
    table = ir.Constant(kind, [I8(index % 4 * (index // 4)) for index in range(BYTES)])
    for part in range(4):
        groups = [8 * (byte // 32) + 2 * part + byte % 32 // 16 for byte in range(BYTES)]
        (codes,) = block.words.twos(e, block.once(_bytes, 16), 2 * part)
        spread_ = b.shuffle_vector(scales, scales, lanes_mask(groups))
        index = b.or_(b.bitcast(codes, kind), spread_)
        product = e.call("llvm.x86.avx512.permvar.qi.512", kind, table, index)
        found.append(words_of(product, e))
    return found


def _q2_k_scale(block: Block, step: int) -> Value:
    return block.half(80, LANES)


def _q2_k_minima(block: Block) -> Value:
    return block.e.b.fneg(_q2(block, 4, 82))


def _q3_k(block: Block, step: int) -> list[Value]:
    low, high = block.once(_bytes, 32), block.once(_thirds)
    return block.words.threes(block.e, low, high, 2 * step)


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
    "q3_k": Kind(
        256,
        _SMALL,
        _q3_k,
        _q3_k_scales,
        summed=16,
        least=-4,
        lifted=lambda block: block.once(_q3_scales),
    ),
}
"""By the name of a format."""
SMALL_OF_BYTES: Mapping[str, Kind] = {
    "q2_k": Kind(256, (sum(_SMALL, ()),), _q2_k_products, _q2_k_scale, _q2_k_minima, 16),
}
"""Where bytes are multiplied, those that are not."""
