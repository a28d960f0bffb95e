"""Kernels of latent attention's products with kv_b [heads * (nope + v_dim), rank], read once from
its stored planes: of every head the rows of keys, then of values. Between them attend.py works on
the latents. Capital names are constants of a weight layout, as in planes.py.
"""

from __future__ import annotations

from typing import Any

tl: Any = None
codes: Any = None
exact: Any = None
number: Any = None
SCALES: Any = None
ZEROS: Any = None
HIGH: Any = None
WIDE: Any = None
POWER: Any = None
TERMS: Any = None


def absorb(q, planes, wide, tokens, q_stride, stride, NOPE: tl.constexpr, ROPE: tl.constexpr,
           V_DIM: tl.constexpr, RANK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr,
           ROWS: tl.constexpr, DEPTH: tl.constexpr, TURNED: tl.constexpr):  # fmt: skip
    """wide bf16 [tokens, heads * (RANK + ROPE)]: of every head, q's first NOPE columns times kv_b's
    rows of keys, and q's ROPE columns as they are. q [tokens, heads * (NOPE + ROPE)].

    Programs: (tiles of DEPTH columns of kv_b, HEADS heads, tiles of tokens). Rows are summed, so
    their scales multiply q before it is rounded. TURNED is ROPE as a power of two.
    """
    column, head = tl.program_id(0) * DEPTH, tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    live = (token < tokens)[:, None]
    at = q + (token.to(tl.int64) * q_stride + head * (NOPE + ROPE))[:, None]
    first = head * (NOPE + V_DIM)
    total = tl.full((TOKENS, DEPTH), 0.0, tl.float32)
    for begin in tl.static_range(0, NOPE, ROWS):
        row = begin + tl.arange(0, ROWS)
        query = tl.load(at + row[None, :], live & (row < NOPE)[None, :], 0.0).to(tl.float32)
        scale = factors(planes, first + row, row < NOPE, column, RANK)
        value = exact(
            codes(planes, first + begin, first + NOPE, column, stride, ROWS, DEPTH), planes
        )
        value = from_zeros(value, planes, first + row, row < NOPE, column, RANK)
        query = (query * scale[None, :]).to(tl.bfloat16)
        term = value.to(tl.bfloat16)
        total = tl.dot(query, term, total)
        for _ in tl.static_range(TERMS - 1):
            value = value.to(tl.float32) - term.to(tl.float32)
            term = value.to(tl.bfloat16)
            total = tl.dot(query, term, total)
    to = wide + (token.to(tl.int64) * (HEADS * (RANK + ROPE)) + head * (RANK + ROPE))[:, None]
    place = column + tl.arange(0, DEPTH)
    tl.store(to + place[None, :], total.to(tl.bfloat16), live & (place < RANK)[None, :])
    if tl.program_id(0) == 0:
        turned = tl.arange(0, TURNED)
        inside = live & (turned < ROPE)[None, :]
        rest = tl.load(at + (NOPE + turned)[None, :], inside, 0.0)
        tl.store(to + (RANK + turned)[None, :], rest.to(tl.bfloat16), inside)


def lift(mixed, planes, y, tokens, y_stride, stride, NOPE: tl.constexpr, V_DIM: tl.constexpr,
         RANK: tl.constexpr, HEADS: tl.constexpr, TOKENS: tl.constexpr, ROWS: tl.constexpr,
         DEPTH: tl.constexpr):  # fmt: skip
    """y bf16 [tokens, heads * V_DIM]: of every head, its part of mixed bf16 [tokens, heads * RANK]
    times kv_b's rows of values.

    Programs: (tiles of ROWS rows, HEADS heads, tiles of tokens).
    """
    head = tl.program_id(1)
    token = tl.program_id(2) * TOKENS + tl.arange(0, TOKENS)
    live = token < tokens
    place = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    first = head * (NOPE + V_DIM) + NOPE
    at = mixed + (token.to(tl.int64) * (HEADS * RANK) + head * RANK)[None, :]
    total = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    depth = tl.arange(0, DEPTH)
    for column in range(0, RANK, DEPTH):
        inside = (column + depth < RANK)[:, None] & live[None, :]
        part = tl.load(at + (column + depth)[:, None], inside, 0.0)
        value = exact(codes(planes, first + tl.program_id(0) * ROWS, first + V_DIM, column, stride,
                            ROWS, DEPTH), planes)  # fmt: skip
        value = from_zeros(value, planes, first + place, place < V_DIM, column, RANK)
        term = value.to(tl.bfloat16)
        product = tl.dot(term, part)
        for _ in tl.static_range(TERMS - 1):
            value = value.to(tl.float32) - term.to(tl.float32)
            term = value.to(tl.bfloat16)
            product = tl.dot(term, part, product)
        total += product * factors(planes, first + place, place < V_DIM, column, RANK)[:, None]
    to = y + (token.to(tl.int64) * y_stride + head * V_DIM)[None, :] + place[:, None]
    tl.store(to, total.to(y.dtype.element_ty), (place < V_DIM)[:, None] & live[None, :])


def factors(planes, row, known, column, columns):
    """What codes of each `row` are multiplied by in the block of columns that `column` is in: f32,
    0 for a row that is not known."""
    found = tl.where(known, POWER, 0.0)
    for i in tl.static_range(len(SCALES)):
        if not ZEROS[i]:
            found = element(planes, row, known, column, columns, i) * found
    return found


def from_zeros(value, planes, row, known, column, columns):
    """Exact values [rows, columns] less the zeros of their rows in that block, as exact."""
    for i in tl.static_range(len(SCALES)):
        if ZEROS[i]:
            less = element(planes, row, known, column, columns, i)
            value = value.to(tl.float32) - less[:, None]
    return value


def element(planes, row, known, column, columns, PLANE: tl.constexpr):
    """f32 of plane PLANE after the codes that covers each `row` at `column`."""
    at = row * 0
    if HIGH[PLANE] > 0:
        at = row // HIGH[PLANE]
    if WIDE[PLANE] > 0:
        at = at * ((columns + WIDE[PLANE] - 1) // WIDE[PLANE]) + column // WIDE[PLANE]
    return number(tl.load(planes[1 + PLANE] + at, known, 0), SCALES[PLANE])
