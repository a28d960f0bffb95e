"""Kernels of dense layers: y = x W^T, and the activation of x gate^T and x up^T."""

from __future__ import annotations

from typing import Any

tl: Any = None
sums: Any = None
joined: Any = None
activation: Any = None

BAND = 8
"""Tiles of tokens that are computed beside each other for as many rows of the matrix: what they
share is in the cache."""


def linear(x, planes, others, bias, second, y, partials, counters, tokens, rows, columns, stride,
           parts,
           ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, REPEAT: tl.constexpr,
           PAIR: tl.constexpr, SPLIT: tl.constexpr, BIAS: tl.constexpr):  # fmt: skip
    """y [tokens, rows], f32 or bf16, = x bf16 [tokens, columns] times the transpose of the matrix
    `planes`, plus `bias` [rows]; with PAIR the activation of that and of `others`, plus `second`.

    Programs: tiles, and with SPLIT for each tile `parts` that share its columns.
    """
    tile = tl.program_id(0)
    high = (tokens + TOKENS - 1) // TOKENS
    across = (rows + ROWS - 1) // ROWS
    band = tile // (BAND * across) * BAND
    size = min(high - band, BAND)
    inner = tile % (BAND * across)
    first = inner // size * ROWS
    token = (band + inner % size) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    begin, end = 0, columns
    if SPLIT:
        steps = ((columns + DEPTH * REPEAT - 1) // (DEPTH * REPEAT) + parts - 1) // parts
        begin = tl.program_id(1) * steps * (DEPTH * REPEAT)
        end = min(begin + steps * (DEPTH * REPEAT), columns)
    row = token.to(tl.int64)
    one, two = sums(x, tokens, row, live, planes, others, first, rows, begin, end, columns, stride,
                    ROWS, TOKENS, DEPTH, REPEAT, PAIR)  # fmt: skip
    if SPLIT:
        last, one, two = joined(one, two, partials, counters, tile, tl.program_id(1), parts, ROWS,
                                TOKENS, PAIR)  # fmt: skip
        live = live & last
    row = first + tl.arange(0, ROWS)
    if BIAS:
        one += tl.load(bias + row, row < rows, 0).to(tl.float32)[:, None]
    if PAIR:
        if BIAS:
            two += tl.load(second + row, row < rows, 0).to(tl.float32)[:, None]
        one = activation(one, two, one)
    place = y + token.to(tl.int64)[None, :] * rows + row[:, None]
    tl.store(place, one.to(y.dtype.element_ty), live[None, :] & (row < rows)[:, None])
