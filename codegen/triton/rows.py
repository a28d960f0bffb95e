"""Kernels over rows of activations: norms, sums and rotary embedding. All is f32 between a load and
a store, which round to what the tensors are.
"""

from __future__ import annotations

from typing import Any

tl: Any = None


def norm(x, gamma, y, tokens, groups, width, eps, x_stride, y_stride, LINES: tl.constexpr,
         WIDE: tl.constexpr):  # fmt: skip
    """y [tokens, groups * width] = the root-mean-square norm of each chunk of `width` numbers of x,
    times gamma [width].

    Programs: tiles of LINES chunks.
    """
    line = tl.program_id(0) * LINES + tl.arange(0, LINES)
    column = tl.arange(0, WIDE)
    inside = (line < tokens * groups)[:, None] & (column < width)[None, :]
    token, group = (line // groups).to(tl.int64), line % groups * width
    at = (token * x_stride + group)[:, None] + column[None, :]
    value = tl.load(x + at, inside, 0.0).to(tl.float32)
    found = normed(value, gamma, column, width, eps)
    to = (token * y_stride + group)[:, None] + column[None, :]
    tl.store(y + to, found.to(y.dtype.element_ty), inside)


def normed(value, gamma, column, width, eps):
    """The norm of lines [lines, columns], zeros from `width` on, times gamma."""
    power = tl.sum(value * value, 1) / width
    factor = tl.load(gamma + column, column < width, 0.0).to(tl.float32)
    return value * (1.0 / tl.sqrt(power + eps))[:, None] * factor[None, :]


def add_norm(h, d0, d1, gamma, h_out, y, width, eps, h_stride, d0_stride, d1_stride, out_stride,
             y_stride, MORE: tl.constexpr, NORM: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """h_out [tokens, width] = h + d0, with MORE h + (d0 + d1); with NORM y its norm, times gamma.

    Programs: tokens. `h_out` may be one of the terms.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, WIDE)
    inside = column < width
    more = tl.load(d0 + token * d0_stride + column, inside, 0.0).to(tl.float32)
    if MORE:
        more += tl.load(d1 + token * d1_stride + column, inside, 0.0).to(tl.float32)
    total = tl.load(h + token * h_stride + column, inside, 0.0).to(tl.float32) + more
    tl.store(h_out + token * out_stride + column, total.to(h_out.dtype.element_ty), inside)
    if NORM:
        found = normed(total[None, :], gamma, column, width, eps)
        to = y + token * y_stride + column[None, :]
        tl.store(to, found.to(y.dtype.element_ty), inside[None, :])


def rotary(x, gamma, positions, inverse, tokens, eps, factor, stride, NUMBER: tl.constexpr,
           HEAD_DIM: tl.constexpr, START: tl.constexpr, PAIRS: tl.constexpr,
           INTERLEAVED: tl.constexpr, NORM: tl.constexpr, HEADS: tl.constexpr, WIDE: tl.constexpr,
           HALF: tl.constexpr):  # fmt: skip
    """x [tokens, NUMBER * HEAD_DIM] with each head's PAIRS pairs of columns from START on turned by
    position * inverse[pair], and lengthened by `factor`; with NORM after the head's norm, times
    gamma [HEAD_DIM].

    A pair's columns follow each other where INTERLEAVED, else they are PAIRS apart. Programs:
    (tokens, tiles of HEADS heads).
    """
    token = tl.program_id(0)
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    at = x + (token.to(tl.int64) * stride + head * HEAD_DIM)[:, None]
    live = (head < NUMBER)[:, None]
    pair = tl.arange(0, HALF)
    turning = live & (pair < PAIRS)[None, :]
    first, apart = START + pair, PAIRS
    if INTERLEAVED:
        first, apart = START + 2 * pair, 1
    a = tl.load(at + first[None, :], turning, 0.0).to(tl.float32)
    b = tl.load(at + (first + apart)[None, :], turning, 0.0).to(tl.float32)
    if NORM:
        column = tl.arange(0, WIDE)
        inside = live & (column < HEAD_DIM)[None, :]
        value = tl.load(at + column[None, :], inside, 0.0).to(tl.float32)
        scale = (1.0 / tl.sqrt(tl.sum(value * value, 1) / HEAD_DIM + eps))[:, None]
        gammas = tl.load(gamma + column, column < HEAD_DIM, 0.0).to(tl.float32)
        tl.debug_barrier()  # all is read before anything is written
        still = inside & ((column < START) | (column >= START + 2 * PAIRS))[None, :]
        kept = value * scale * gammas[None, :]
        tl.store(at + column[None, :], kept.to(x.dtype.element_ty), still)
        a = a * scale * tl.load(gamma + first, pair < PAIRS, 0.0).to(tl.float32)[None, :]
        b = b * scale * tl.load(gamma + first + apart, pair < PAIRS, 0.0).to(tl.float32)[None, :]
    position = tl.load(positions + token).to(tl.float32)
    angle = position * tl.load(inverse + pair, pair < PAIRS, 0.0)
    cos, sin = (tl.cos(angle) * factor)[None, :], (tl.sin(angle) * factor)[None, :]
    tl.store(at + first[None, :], (a * cos - b * sin).to(x.dtype.element_ty), turning)
    tl.store(at + (first + apart)[None, :], (b * cos + a * sin).to(x.dtype.element_ty), turning)


def append(news, caches, slots, new_strides, cache_strides, WIDTHS: tl.constexpr,
           COLUMNS: tl.constexpr):  # fmt: skip
    """Rows `slots` i64 [tokens] of each of `caches` become those of `news`, WIDTHS columns wide.

    Programs: (tokens, tiles of COLUMNS of the widest).
    """
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(slots + token)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    for i in tl.static_range(len(WIDTHS)):
        value = tl.load(news[i] + token * new_strides[i] + column, column < WIDTHS[i], 0.0)
        to = caches[i] + row * cache_strides[i] + column
        tl.store(to, value.to(tl.bfloat16), column < WIDTHS[i])
