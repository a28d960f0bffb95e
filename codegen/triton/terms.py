"""Kernel: x as the sum of two E4M3 numbers, for products with E4M3 weights that tensor cores make
without decoding (compute capability 8.9 and later).

A row's BLOCK columns have one scale, a power of two; the second number counts in sixteenths of it:
what the first leaves is at most 16 where it is at most 448. Together they keep the 8 significant
bits of bf16 but for values some 2^14 below their block's largest.
"""

from __future__ import annotations

from typing import Any

tl: Any = None
BLOCK: Any = None


def power_above(value):
    """The exponent field of the f32 power of two by which `value` > 0 is divided to be at most 448,
    E4M3's largest: 448 is 1.75 * 2^8, and what is added carries for mantissas above 1.75."""
    bits = tl.maximum(value, 1e-30).to(tl.int32, bitcast=True)
    return ((bits + 0x1FFFFF) >> 23) - 8


def terms(x, codes, scales, tokens, columns, TOKENS: tl.constexpr):
    """codes E4M3 [2, tokens, columns] and scales f32 [tokens, blocks of columns], of x bf16
    [tokens, columns]. Programs: tiles of tokens, blocks of columns."""
    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (token < tokens)[:, None] & (column < columns)[None, :]
    place = token[:, None] * columns + column[None, :]
    left = tl.load(x + place, inside, 0.0).to(tl.float32)
    power = power_above(tl.max(tl.abs(left), 1))
    scale = (power << 23).to(tl.float32, bitcast=True)
    tl.store(scales + token * tl.num_programs(1) + tl.program_id(1), scale, token < tokens)
    left *= ((254 - power) << 23).to(tl.float32, bitcast=True)[:, None]
    code = left.to(tl.float8e4nv)
    tl.store(codes + place, code, inside)
    rest = (left - code.to(tl.float32)) * 16.0
    second = (token + tokens)[:, None] * columns + column[None, :]
    tl.store(codes + second, rest.to(tl.float8e4nv), inside)
