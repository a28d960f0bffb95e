"""Device functions that sum products over columns, and join parts of sums in a fixed order.

Tiles are [rows, tokens]. A step of columns is multiplied by the rows' scales before it is added up,
or where scales cover whole rows the sum is.
"""

from __future__ import annotations

from typing import Any

tl: Any = None
exact: Any = None
codes: Any = None
factor: Any = None
less_zeros: Any = None
TERMS: Any = None
KIND: Any = None
BLOCK: Any = None
EIGHTS: Any = None
"""Whether x is two E4M3 numbers (terms.py), and weights are multiplied as they are; x is then a
tuple: codes of both, scales."""
EACH: Any = None
"""Whether sums of a step are multiplied before they are added up."""
SCALED: Any = None
"""Whether sums of all steps are."""


def multiplied(value, x, total):
    """`total` plus the product of exact values [ROWS, DEPTH] and x bf16 [DEPTH, TOKENS]."""
    term = value.to(tl.bfloat16)
    total = tl.dot(term, x, total)
    for _ in tl.static_range(TERMS - 1):
        value = value.to(tl.float32) - term.to(tl.float32)
        term = value.to(tl.bfloat16)
        total = tl.dot(term, x, total)
    return total


def added(total, x, planes, first, rows, column, columns, stride, ROWS: tl.constexpr,
          TOKENS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """`total` plus the product of the DEPTH columns from `column` on, with `activations` of x, or
    with EIGHTS `eights`."""
    code = codes(planes, first, rows, column, stride, ROWS, DEPTH)
    if EIGHTS:
        code = code.to(tl.float8e4nv, bitcast=True)
        product = tl.dot(code, x[0], tl.dot(code, x[1]) * 0.0625) * x[2][None, :]
        total += product * factor(planes, first, rows, column, columns, ROWS)
    else:
        value = less_zeros(exact(code, planes), planes, first, rows, column, columns, ROWS)
        if EACH:
            product = multiplied(value, x, tl.full((ROWS, TOKENS), 0.0, tl.float32))
            total += product * factor(planes, first, rows, column, columns, ROWS)
        else:
            total = multiplied(value, x, total)
    return total


def activations(x, row, live, column, columns, DEPTH: tl.constexpr):
    """Columns of the rows i64 [TOKENS] of x that are `live`, else 0: bf16 [DEPTH, TOKENS]."""
    depth = column + tl.arange(0, DEPTH)
    inside = live[None, :] & (depth < columns)[:, None]
    return tl.load(x + (row * columns)[None, :] + depth[:, None], inside, 0.0)


def eights(x, height, row, live, column, columns, DEPTH: tl.constexpr):
    """The same of both E4M3 numbers, and the scales [TOKENS] of the rows for these columns."""
    blocks = (columns + BLOCK - 1) // BLOCK
    return (activations(x[0], row, live, column, columns, DEPTH),
            activations(x[0], row + height, live, column, columns, DEPTH),
            tl.load(x[1] + row * blocks + column // BLOCK, live, 0.0))  # fmt: skip


def sums(x, height, row, live, planes, others, first, rows, begin, end, columns, stride,
         ROWS: tl.constexpr, TOKENS: tl.constexpr, DEPTH: tl.constexpr, REPEAT: tl.constexpr,
         PAIR: tl.constexpr):  # fmt: skip
    """f32 [ROWS, TOKENS] of the matrix `planes` from row `first` on, times rows of x, summed over
    the columns [begin, end), REPEAT steps at a time; with PAIR the same of `others` besides, else
    zeros. `height` are all rows of x.
    """
    one = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    two = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for start in range(begin, end, DEPTH * REPEAT):
        for i in tl.static_range(REPEAT):
            column = start + i * DEPTH
            if EIGHTS:
                part = eights(x, height, row, live, column, columns, DEPTH)
            else:
                part = activations(x, row, live, column, columns, DEPTH)
            one = added(one, part, planes, first, rows, column, columns, stride, ROWS, TOKENS,
                        DEPTH)  # fmt: skip
            if PAIR:
                two = added(two, part, others, first, rows, column, columns, stride, ROWS, TOKENS,
                            DEPTH)  # fmt: skip
    if SCALED:
        one *= factor(planes, first, rows, 0, columns, ROWS)
        if PAIR:
            two *= factor(others, first, rows, 0, columns, ROWS)
    return one, two


def joined(one, two, partials, counters, tile, part, parts, ROWS: tl.constexpr,
           TOKENS: tl.constexpr, PAIR: tl.constexpr):  # fmt: skip
    """(whether this program is the last of a tile's `parts`, and then the sums of all their `one`
    and, with PAIR, `two`, in the order of parts; else anything).

    `partials` f32 [tiles, parts, 1 or 2, ROWS, TOKENS]; `counters` i32 [tiles] are 0 before and
    after.
    """
    place = tl.arange(0, ROWS)[:, None] * TOKENS + tl.arange(0, TOKENS)[None, :]
    size: tl.constexpr = ROWS * TOKENS * (1 + PAIR)
    own = partials + tile.to(tl.int64) * parts * size
    tl.store(own + part * size + place, one)
    if PAIR:
        tl.store(own + part * size + ROWS * TOKENS + place, two)
    tl.debug_barrier()  # the one thread that counts speaks for all that have stored
    last = tl.atomic_add(counters + tile, 1, sem="acq_rel") == parts - 1
    tl.debug_barrier()
    if last:
        one = tl.full((ROWS, TOKENS), 0.0, tl.float32)
        two = tl.full((ROWS, TOKENS), 0.0, tl.float32)
        for each in range(parts):
            at = own + each * size + place
            one += tl.load(at, cache_modifier=".cg")
            if PAIR:
                two += tl.load(at + ROWS * TOKENS, cache_modifier=".cg")
        tl.store(counters + tile, 0)
    return last, one, two
