"""Decoding weight rows into vectors that hold one K position of many rows: f32, or pairs of bf16
or (int4) of i16.

Hides the transposes. For pairs (`vdpbf16ps`), 16 rows x 64 bytes in four shuffles a vector: two
stages move 128-bit lanes so that a vector holds the same 16 bytes of rows i, 4 + i, 8 + i, 12 + i;
two unpacks inside the lanes bring four neighbouring rows together. FP8 is still bytes then, so one
shuffle moves 64 weights. Its bf16 value is two table look-ups of the seven magnitude bits, one for
each byte (`vpermi2b`), the sign, and two unpacks; every code is exact and the NaN codes give NaN.
A nibble pair goes through one 32-entry table of words (`vpermw`), whose index ignores what lies
above its five bits.
"""

from __future__ import annotations

import numpy as np
from llvmlite import ir

from hmc.codegen.formats.dot import e4m3_as_bf16
from hmc.codegen.formats.unpack import fp8_vectors
from hmc.codegen.formats.weights import masked_vec, weights_f32
from hmc.codegen.ir import F32, I8, I16, I32, Emitter, Value, const, vec
from hmc.codegen.spec import WeightFormat

COLUMN = {"fp8": 16, "bf16": 8, "int4": 32}
"""Weights of a row in 16 bytes, the unit of the transpose."""

_NIBBLE_PAIRS = 4
"""Pairs of int4 weights in a stored word."""


def decode_pairs(
    e: Emitter,
    weight: WeightFormat,
    panel: Value,
    stride: int,
    rows: list[Value],
    length: int,
) -> None:
    """Store the first `length` weights of 16 `rows` (i8*) as pair vectors.

    Pair s goes to `panel` (i8*) + s * `stride` words. Pairs past `length` up to a whole 64 bytes of
    a row are stored too, as finite numbers; nothing past it is read.
    """
    unit = 4 * COLUMN[weight]
    element, count = {"fp8": (I8, 64), "bf16": (I16, 32), "int4": (I32, 16)}[weight]

    def block(start: Value, valid: int) -> None:
        index = e.b.udiv(start, const(unit // count))
        valid = -(-valid * count // unit)
        loaded = [masked_vec(e, row, index, element, count, valid) for row in rows]
        first = e.b.mul(start, const(stride // 2))
        target = e.offset(panel, e.b.mul(first, const(4)))
        words = [e.b.bitcast(row, vec(I32, 16)) for row in loaded]
        for column, quads in enumerate(_lane_columns(e, words)):
            moved = e.offset(target, const(column * COLUMN[weight] // 2 * stride * 4))
            _store_column(e, weight, moved, stride, quads)

    whole = length // unit * unit
    if whole:
        with e.for_range(0, whole, unit) as start:
            block(start, unit)
    if whole < length:
        block(const(whole), length - whole)


def _store_column(
    e: Emitter, weight: WeightFormat, panel: Value, stride: int, quads: list[Value]
) -> None:
    """16 bytes of 16 rows, as `_lane_columns` gives them, to pair vectors."""
    element = I16 if weight == "fp8" else I32
    decode = {"fp8": _fp8, "bf16": lambda _, pairs: [pairs], "int4": _int4}[weight]
    pairs = [pair for four in _unpack_four(e, quads, element) for pair in decode(e, four)]
    for index, pair in enumerate(pairs):
        e.store(e.b.bitcast(pair, vec(I32, 16)), panel, const(index * stride), align=4)


def decode_columns(
    e: Emitter,
    weight: WeightFormat,
    panel: Value,
    stride: int,
    rows: list[Value],
    length: int,
) -> None:
    """Store the first `length` weights of `rows` (i8*), of a format without scales, as f32 vectors,
    one lane a row.

    Weight s goes to `panel` (i8*) + s * `stride` words; up to a whole vector of weights past
    `length` zeros are stored, and nothing past it is read.
    """
    b, lanes = e.b, len(rows)

    def block(start: Value, count: int) -> None:
        vectors = [weights_f32(e, weight, row, start, count)[0] for row in rows]
        for k, column in enumerate(transpose(e, vectors)):
            if k >= count:
                column = e.zeros(F32, lanes)
            e.store(column, panel, b.mul(b.add(start, const(k)), const(stride)), align=4)

    whole = length // lanes * lanes
    if whole:
        with e.for_range(0, whole, lanes) as start:
            block(start, lanes)
    if whole < length:
        block(const(whole), length - whole)


def decode_codes(
    e: Emitter, panel: Value, stride: int, rows: list[Value], length: int, factor: Value
) -> None:
    """Store the first `length` fp8 weights of `rows` (i8*) as f32 vectors, one lane a row, x 2^-120
    times `factor` (`unpack.py` says why).

    Weight s goes to `panel` (i8*) + s * `stride` words; weights past `length` up to a whole vector
    of codes are stored as zeros, and nothing past it is read.
    """
    b, lanes = e.b, len(rows)
    codes = vec(I8, 4 * lanes)

    def block(start: Value, valid: int) -> None:
        loaded = [masked_vec(e, row, start, I8, 4 * lanes, valid) for row in rows]
        words = [b.bitcast(row, vec(I32, lanes)) for row in loaded]
        for number, column in enumerate(transpose(e, words)):
            column = b.bitcast(column, codes)
            for place, value in enumerate(fp8_vectors(e, column, multiply=True)):
                k = b.add(start, const(4 * number + place))
                e.store(b.fmul(value, factor), panel, b.mul(k, const(stride)), align=4)

    whole = length // (4 * lanes) * 4 * lanes
    if whole:
        with e.for_range(0, whole, 4 * lanes) as start:
            block(start, 4 * lanes)
    if whole < length:
        block(const(whole), length - whole)


def decode_words(e: Emitter, panel: Value, stride: int, rows: list[Value], length: int) -> None:
    """Store the first `length` int4 weights of `rows` (i8*) as pairs of i16: nibble - 8, one lane a
    row.

    Pair s goes to `panel` (i8*) + s * `stride` words. Pairs past `length` up to a whole vector of
    stored words are stored too; nothing past it is read.
    """
    b, lanes = e.b, len(rows)
    kind = vec(I32, lanes)
    eight = ir.Constant(vec(I16, 2 * lanes), [ir.Constant(I16, 8)] * (2 * lanes))

    def splat(value: int) -> ir.Constant:
        return ir.Constant(kind, [ir.Constant(I32, value)] * lanes)

    def block(word: Value, valid: int) -> None:
        columns = transpose(e, [masked_vec(e, row, word, I32, lanes, valid) for row in rows])
        for number, column in enumerate(columns):
            for pair in range(_NIBBLE_PAIRS):
                low = b.lshr(column, splat(8 * pair)) if pair else column
                high = b.and_(b.shl(low, splat(12)), splat(0xF0000))
                both = b.bitcast(b.or_(b.and_(low, splat(0xF)), high), eight.type)
                moved = const((number * _NIBBLE_PAIRS + pair) * stride)
                place = b.add(b.mul(word, const(_NIBBLE_PAIRS * stride)), moved)
                e.store(b.bitcast(b.sub(both, eight), kind), panel, place, align=4)

    words = -(-length // (2 * _NIBBLE_PAIRS))
    whole = words // lanes * lanes
    if whole:
        with e.for_range(0, whole, lanes) as word:
            block(word, lanes)
    if whole < words:
        block(const(whole), words - whole)


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
                _indices(high if i & distance else low),
            )
            for i in range(count)
        ]
        distance *= 2
    return vectors


def _fp8(e: Emitter, codes: Value) -> list[Value]:
    """Four codes a lane to two vectors of pairs."""
    b = e.b
    codes = b.bitcast(codes, vec(I8, 64))
    high, low = _fp8_tables()
    sign = b.and_(codes, _bytes(np.full(64, 0x80, np.uint8)))
    top, bottom = b.or_(_permute_bytes(e, codes, high), sign), _permute_bytes(e, codes, low)
    return [_unpack(e, bottom, top, I8, half) for half in range(2)]


def _int4(e: Emitter, words: Value) -> list[Value]:
    """Eight nibbles a lane to four vectors of pairs."""
    b = e.b
    values = (np.arange(32) % 16 - 8).astype(np.float32).view(np.uint32) >> 16
    table = ir.Constant(vec(I16, 32), [ir.Constant(I16, int(word)) for word in values])
    # Nibble 2p falls on bit 0 of the low word, nibble 2p + 1 on bit 0 of the high word.
    order = _indices([lane + (32 if lane % 2 else 0) for lane in range(32)])

    def shifted(right: int) -> Value:
        amount = ir.Constant(words.type, [ir.Constant(I32, abs(right))] * 16)
        return b.bitcast((b.lshr if right >= 0 else b.shl)(words, amount), vec(I16, 32))

    return [
        e.call(
            "llvm.x86.avx512.permvar.hi.512",
            table.type,
            table,
            b.shuffle_vector(shifted(8 * pair), shifted(8 * pair - 12), order),
        )
        for pair in range(4)
    ]


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
    return e.b.shuffle_vector(left, right, _indices(order))


def _unpack_four(e: Emitter, quads: list[Value], element: ir.IntType) -> list[Value]:
    """Four vectors to four: lane by lane, elements of the four inputs side by side."""
    even = [_unpack(e, quads[0], quads[2], element, half) for half in range(2)]
    odd = [_unpack(e, quads[1], quads[3], element, half) for half in range(2)]
    return [_unpack(e, even[g // 2], odd[g // 2], element, g % 2) for g in range(4)]


def _unpack(e: Emitter, left: Value, right: Value, element: ir.IntType, half: int) -> Value:
    """`vpunpckl` (half 0) or `vpunpckh` (half 1) of 512 bits in units of `element`."""
    count = 512 // element.width
    per_lane = count // 4
    kind = vec(element, count)
    order = []
    for lane in range(4):
        for i in range(per_lane // 2):
            at = lane * per_lane + half * (per_lane // 2) + i
            order += [at, count + at]
    return e.b.shuffle_vector(e.b.bitcast(left, kind), e.b.bitcast(right, kind), _indices(order))


def _permute_bytes(e: Emitter, codes: Value, table: tuple[Value, Value]) -> Value:
    """A byte of a 128-entry table for each of 64 codes; bit 7 of a code is ignored."""
    return e.call("llvm.x86.avx512.vpermi2var.qi.512", codes.type, table[0], codes, table[1])


def _fp8_tables() -> tuple[tuple[Value, Value], tuple[Value, Value]]:
    """High and low bytes of the bf16 values of E4M3FN magnitudes 0..127, as halves of 64."""
    bits = e4m3_as_bf16()
    high, low = (bits >> 8).astype(np.uint8), (bits & 0xFF).astype(np.uint8)
    return (_bytes(high[:64]), _bytes(high[64:])), (_bytes(low[:64]), _bytes(low[64:]))


def _bytes(values: np.ndarray) -> ir.Constant:
    return ir.Constant(vec(I8, 64), [ir.Constant(I8, int(value)) for value in values])


def _indices(order: list[int]) -> ir.Constant:
    return ir.Constant(vec(I32, len(order)), [ir.Constant(I32, index) for index in order])
