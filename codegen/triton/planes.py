"""Device functions that read stored matrices. Capital names are constants that build.py binds, most
of them fields of a `Layout`.

`planes` is a tuple of pointers: codes, scales in the order of the format's row, and the f32 values
of codes (read for kind "table" alone). Everything is masked: rows and columns may be any number.
"""

from __future__ import annotations

from typing import Any

tl: Any = None
BITS: Any = None
PACKED: Any = None
HALVES: Any = None
"""Bits of what is left after each halving of a unit, down to a code's."""
KIND: Any = None
FIRST: Any = None
"""`values[0]` of kind "line"."""
TERMS: Any = None
POWER: Any = None
E4M3: Any = None
E5M2: Any = None
E8M0: Any = None
SCALES: Any = None
"""What the elements of each plane of scales are: one of these, or 0; HIGH and WIDE: how many rows
and columns one covers."""
ZEROS: Any = None
"""Which of these planes hold zeros, to be subtracted before."""
HIGH: Any = None
WIDE: Any = None
TYPES: Any = None
"""Pointer types of codes and scales, and of the values of codes."""


def planes_at(table, values):
    """The planes whose addresses are at `table` i64, codes first; multiples of 16 bytes."""
    planes = (tl.multiple_of(tl.load(table).to(TYPES[0]), 16),)
    for i in tl.static_range(len(SCALES)):
        address = tl.load(table + (1 + i))
        planes = planes + (tl.multiple_of(address.to(TYPES[1 + i]), 16),)  # noqa: RUF005
    return planes + (values,)  # noqa: RUF005


def half_of(code):
    """fp16 of E4M3 codes, times 1/256: the fields are the same, with one bit more of exponent.
    Adding 1 carries out of the magnitude of NaN alone, and makes its exponent fp16's largest."""
    code = code.to(tl.uint16)
    size = code & 0x7F
    bits = ((code & 0x80) << 8) | (size << 7) | (((size + 1) & 0x80) << 7)
    return bits.to(tl.float16, bitcast=True)


def small_of(code):
    """fp16 of E2M1 codes, times 2^-14, likewise."""
    code = code.to(tl.uint16)
    return (((code & 8) << 12) | ((code & 7) << 9)).to(tl.float16, bitcast=True)


def number(word, WHAT: tl.constexpr):
    """f32 of a word that is a float: of 8 bits as WHAT says, or as its pointer does."""
    if WHAT == E4M3:
        found = half_of(word).to(tl.float32) * 256.0
    elif WHAT == E5M2:
        found = (word.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(tl.float32)
    elif WHAT == E8M0:
        bits = tl.where(word == 0, 1 << 22, word.to(tl.uint32) << 23)
        found = tl.where(word == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
    else:
        found = word.to(tl.float32)
    return found


def codes(planes, first, rows, column, stride, ROWS: tl.constexpr, DEPTH: tl.constexpr):
    """Codes [ROWS, DEPTH] from row `first` and `column` on, unpacked."""
    row = tl.arange(0, ROWS)
    unit = tl.arange(0, DEPTH // PACKED)
    base = planes[0] + (first.to(tl.int64) * stride + column // PACKED)
    # whole units of a row are read: what is behind its last column is multiplied by 0
    inside = (first + row < rows)[:, None] & (column // PACKED + unit < stride)[None, :]
    found = tl.load(base + (row[:, None] * stride + unit[None, :]), inside, 0)
    for i in tl.static_range(len(HALVES)):
        low = found & ((1 << HALVES[i]) - 1)
        found = tl.join(low, found >> HALVES[i])
        found = tl.reshape(found, (ROWS, (DEPTH // PACKED) << (i + 1)))
    return found


def exact(code, planes):
    """What codes are, times 1 / POWER, as a float that holds it: bf16, or fp16, or f32."""
    if KIND == "e4m3":
        found = half_of(code)
    elif KIND == "e5m2":
        found = (code.to(tl.uint16) << 8).to(tl.float16, bitcast=True)
    elif KIND == "e2m1":
        found = small_of(code)
    elif KIND == "signed":
        found = code.to(tl.int8, bitcast=True).to(tl.float32)
    elif KIND == "line":
        found = code.to(tl.float32) + FIRST
    elif KIND == "table":
        found = tl.load(planes[len(SCALES) + 1] + code.to(tl.int32))
    elif KIND == "e8m0":
        found = number(code, E8M0)
    else:
        found = code
    return found


def spread(planes, first, rows, column, columns, PLANE: tl.constexpr, ROWS: tl.constexpr):
    """What plane PLANE after the codes holds of each row for the columns from `column` on: f32
    [ROWS, 1], or one number for all of them."""
    across, block = 1, 0
    if WIDE[PLANE] > 0:
        across, block = (columns + WIDE[PLANE] - 1) // WIDE[PLANE], column // WIDE[PLANE]
    if HIGH[PLANE] % ROWS == 0:
        line = 0
        if HIGH[PLANE] > 0:
            line = first // HIGH[PLANE]
        word = tl.load(planes[1 + PLANE] + (line * across + block), column < columns, 0)
    else:
        row = first + tl.arange(0, ROWS)
        word = tl.load(planes[1 + PLANE] + (row // HIGH[PLANE] * across + block)[:, None],
                       ((row < rows) & (column < columns))[:, None], 0)  # fmt: skip
    return number(word, SCALES[PLANE])


def less_zeros(value, planes, first, rows, column, columns, ROWS: tl.constexpr):
    """Exact values less the zeros that cover them, as exact."""
    for i in tl.static_range(len(SCALES)):
        if ZEROS[i]:
            value = value.to(tl.float32) - spread(planes, first, rows, column, columns, i, ROWS)
    return value


def factor(planes, first, rows, column, columns, ROWS: tl.constexpr):
    """The scale of each row for the columns from `column` on, times POWER: f32 [ROWS, 1], or one
    for all of them."""
    found = POWER
    for i in tl.static_range(len(SCALES)):
        if not ZEROS[i]:
            found = spread(planes, first, rows, column, columns, i, ROWS) * found
    return found
