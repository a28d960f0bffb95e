"""Decoding weight rows into vectors that hold one K position of many rows: f32, or pairs of bf16
or (int4) of i16.

Hides the transposes. For pairs (`vdpbf16ps`), 16 rows x 64 bytes in four shuffles a vector: two
stages move 128-bit lanes so that a vector holds the same 16 bytes of rows i, 4 + i, 8 + i, 12 + i;
two unpacks inside the lanes bring four neighbouring rows together. Codes are as stored then, so one
shuffle moves 64 bytes of them; every code is exact and NaN codes give NaN (pairs.py). Zeros are
taken off the pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llvmlite import ir

from hmc.codegen.formats.pairs import PairCodes
from hmc.codegen.formats.planes import Row
from hmc.codegen.formats.unpack import fp8_vectors
from hmc.codegen.formats.weights import weights_f32
from hmc.codegen.formats.words import WordCodes
from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import cut, for_blocks, isplat, masked_vec, splat_int, unpack_masks


@dataclass(frozen=True)
class Chunk:
    """`length` weights of each of `rows` (a lane each) from column `k` on, on their way to `panel`
    (i8*), `stride` words between steps; `codes` (i8*) are those of each row at that column.

    What is decoded past `length`, up to a whole vector of each row, is stored too, as finite
    numbers; nothing past it is read.
    """

    panel: Value
    stride: int
    rows: list[Row]
    codes: list[Value]
    k: Value
    length: int

    def store(
        self,
        e: Emitter,
        count: int,
        size: int,
        words: int,
        load: Callable[[Value, Value, int], Value],
        decode: Callable[[list[Value], int], Iterator[Value]],
    ) -> None:
        """Of each `size` of the `count` items of a row: the vectors that `decode(loaded, valid)`
        makes of what `load(row, start, valid)` loads of the rows, step after step; an item is
        `words` words of the panel.
        """

        def block(start: Value, valid: int) -> None:
            loaded = [load(row, start, valid) for row in self.codes]
            first = e.b.mul(start, const(words))
            for step, vector in enumerate(decode(loaded, valid)):
                place = e.b.add(first, const(step * self.stride))
                e.store(vector, self.panel, place, align=4)

        for_blocks(e, count, size, block)


@dataclass(frozen=True)
class Zeros:
    """What codes are less by: `at(column)` (i64, of the chunk) is it for the `columns` from there
    on, a lane each row, negative (f32).
    """

    columns: int
    at: Callable[[Value], Value]


def decode_pairs(e: Emitter, codes: PairCodes, chunk: Chunk, zeros: Zeros | None) -> None:
    """Weights of 16 rows as pairs of bf16."""
    words, size = vec(I32, 16), 16 * codes.word

    def block(start: Value, valid: int) -> None:
        loaded = [codes.words(e, row, start, valid) for row in chunk.codes]
        panel = e.offset(chunk.panel, e.b.mul(start, const(2 * chunk.stride)))
        column, less = 0, None
        for quads in _lane_columns(e, [e.b.bitcast(row, words) for row in loaded]):
            four = _unpack_four(e, quads, codes.quad)
            pairs = [pair for quad in four for pair in codes.pairs(e, quad)]
            for step, pair in enumerate(pairs):
                if zeros and column % zeros.columns == 0 and column < valid:
                    less = zeros.at(e.b.add(start, const(column)))
                pair = e.b.bitcast(pair, words)
                pair = pair if less is None else _less(e, pair, less)
                e.store(pair, panel, const(step * chunk.stride), align=4)
                column += 2
            panel = e.offset(panel, const(4 * len(pairs) * chunk.stride))

    for_blocks(e, chunk.length, size, block)


def _less(e: Emitter, pairs: Value, zero: Value) -> Value:
    """Pairs of bf16 plus the f32 `zero` of their lanes, which bf16 holds exactly."""
    b, upper = e.b, isplat(0xFFFF0000, 16)
    halves = b.shl(pairs, isplat(16, 16)), b.and_(pairs, upper)
    low, high = (b.bitcast(b.fadd(b.bitcast(h, zero.type), zero), pairs.type) for h in halves)
    return b.or_(b.lshr(low, isplat(16, 16)), b.and_(high, upper))


def decode_columns(e: Emitter, spec: KernelSpec, chunk: Chunk) -> None:
    """Weights as f32, as `weights_f32` has them."""
    lanes = len(chunk.rows)

    def block(start: Value, valid: int) -> None:
        index = e.b.add(chunk.k, start)
        loaded = [weights_f32(e, spec, row, index, valid)[0] for row in chunk.rows]
        for step, column in enumerate(transpose(e, loaded)):
            value = column if step < valid else e.zeros(F32, lanes)
            place = e.b.mul(e.b.add(start, const(step)), const(chunk.stride))
            e.store(value, chunk.panel, place, align=4)

    for_blocks(e, chunk.length, lanes, block)


def decode_codes(e: Emitter, chunk: Chunk, factor: Value | None) -> None:
    """E4M3 weights as f32, x 2^-120 times `factor` (`unpack.py` says why)."""
    lanes = len(chunk.codes)

    def load(row: Value, start: Value, valid: int) -> Value:
        return masked_vec(e, row, start, I8, 4 * lanes, valid)

    def decode(loaded: list[Value], valid: int) -> Iterator[Value]:
        for column in transpose(e, [e.b.bitcast(row, vec(I32, lanes)) for row in loaded]):
            codes = e.b.bitcast(column, vec(I8, 4 * lanes))
            for value in fp8_vectors(e, codes, multiply=True):
                yield value if factor is None else e.b.fmul(value, factor)

    chunk.store(e, chunk.length, 4 * lanes, chunk.stride, load, decode)


def decode_words(e: Emitter, codes: WordCodes, chunk: Chunk, zeros: Zeros | None) -> None:
    """Weights as pairs of i16."""
    b, lanes = e.b, len(chunk.codes)
    size, kind = lanes * codes.word, vec(I16, 2 * lanes)

    def block(start: Value, valid: int) -> None:
        loaded = [codes.columns(e, row, start, valid) for row in chunk.codes]
        first = b.mul(start, const(chunk.stride // 2))
        pairs = (pair for word in transpose(e, loaded) for pair in codes.pairs(e, word))
        more: Value = splat_int(I16, 2 * lanes, codes.least)
        for step, pair in enumerate(pairs):
            if zeros and 2 * step % zeros.columns == 0 and 2 * step < valid:
                more = _twice(e, zeros.at(b.add(start, const(2 * step))))
            both = b.add(b.bitcast(pair, kind), more)
            place = b.add(first, const(step * chunk.stride))
            e.store(b.bitcast(both, pair.type), chunk.panel, place, align=4)

    for_blocks(e, chunk.length, size, block)


def _twice(e: Emitter, zero: Value) -> Value:
    """Whole numbers of f32 lanes, in both words of each."""
    b, count = e.b, zero.type.count
    whole = b.fptosi(zero, vec(I32, count))
    both = b.or_(b.and_(whole, isplat(0xFFFF, count)), b.shl(whole, isplat(16, count)))
    return b.bitcast(both, vec(I16, 2 * count))


def transpose(e: Emitter, vectors: list[Value]) -> list[Value]:
    """n vectors of n lanes (a power of two) transposed: butterflies at distance 1, 2, 4, ..."""
    count = len(vectors)
    distance = 1
    while distance < count:
        low = [lane - distance + count if lane & distance else lane for lane in range(count)]
        high = [lane + count if lane & distance else lane + distance for lane in range(count)]
        vectors = [
            e.b.shuffle_vector(
                vectors[i & ~distance],
                vectors[i | distance],
                lanes_mask(high if i & distance else low),
            )
            for i in range(count)
        ]
        distance *= 2
    return vectors


def words_of(e: Emitter, rows: list[Value]) -> list[Value]:
    """Rows `<16 x i32>`, 8 or 16 of them, transposed: 16 vectors, word after word of all rows."""
    if len(rows) == 16:
        quads = _lane_columns(e, rows)
        return [words for quad in quads for words in _unpack_four(e, quad, I32)]
    blocks = zip(*(cut(e, row, len(rows)) for row in rows), strict=True)
    return [words for block in blocks for words in transpose(e, list(block))]


def _lane_columns(e: Emitter, rows: list[Value]) -> list[list[Value]]:
    """[c][i]: bytes 16 c to 16 c + 15 of rows i, 4 + i, 8 + i, 12 + i, a 128-bit lane each."""
    columns: list[list[Value]] = [[] for _ in range(4)]
    for i in range(4):
        a, b, c, d = (rows[i + 4 * lane] for lane in range(4))
        for half in range(2):
            low = _shuffle_lanes(e, a, b, (2 * half, 2 * half + 1))
            high = _shuffle_lanes(e, c, d, (2 * half, 2 * half + 1))
            columns[2 * half].append(_shuffle_lanes(e, low, high, (0, 2)))
            columns[2 * half + 1].append(_shuffle_lanes(e, low, high, (1, 3)))
    return columns


def _shuffle_lanes(e: Emitter, left: Value, right: Value, lanes: tuple[int, int]) -> Value:
    """128-bit lanes `lanes` of `left`, then of `right` (`vshufi32x4`)."""
    order = [base + 4 * lane + word for base in (0, 16) for lane in lanes for word in range(4)]
    return e.b.shuffle_vector(left, right, lanes_mask(order))


def _unpack_four(e: Emitter, quads: list[Value], element: ir.IntType) -> list[Value]:
    """Four vectors to four: lane by lane, elements of the four inputs side by side."""
    kind = vec(element, 512 // element.width)
    masks = unpack_masks(kind.count)

    def unpack(left: Value, right: Value) -> list[Value]:
        return [
            e.b.shuffle_vector(e.b.bitcast(left, kind), e.b.bitcast(right, kind), mask)
            for mask in masks
        ]

    even, odd = unpack(quads[0], quads[2]), unpack(quads[1], quads[3])
    return unpack(even[0], odd[0]) + unpack(even[1], odd[1])
