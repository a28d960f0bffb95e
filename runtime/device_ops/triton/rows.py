"""Norms, sums and rotary embedding on a GPU by hmc's Triton kernels, one launch each.

Everything is handed to the current stream; nothing waits and no value is read. Tensors of rows may
be views of some columns: their last dimension is dense.
"""

from __future__ import annotations

import torch

from hmc.codegen.triton import library
from hmc.codegen.triton.attend_tiles import power

_NUMBERS = 1 << 10
"""Numbers of a tile that narrow rows share."""


def norm(x: torch.Tensor, gamma: torch.Tensor, y: torch.Tensor, *, groups: int, eps: float) -> None:
    """y [T, groups * width] = the root-mean-square norm of each of `groups` chunks of x's rows,
    times gamma [width]."""
    tokens, width = len(x), x.shape[1] // groups
    wide = power(width)
    lines = max(1, _NUMBERS // wide)
    library.kernels().norm[-(-tokens * groups // lines),](
        x, gamma, y, tokens, groups, width, eps, x.stride(0), y.stride(0), LINES=lines, WIDE=wide,
        num_warps=_warps(lines * wide),
    )  # fmt: skip


def add_norm(
    h: torch.Tensor,
    d0: torch.Tensor,
    d1: torch.Tensor | None,
    h_out: torch.Tensor,
    gamma: torch.Tensor | None = None,
    y: torch.Tensor | None = None,
    *,
    eps: float = 0.0,
) -> None:
    """h_out [T, width] = h + d0 or h + (d0 + d1), and with gamma [width] y its norm times gamma."""
    more, out = d0 if d1 is None else d1, h_out if y is None else y
    width = h.shape[1]
    library.kernels().add_norm[len(h),](
        h, d0, more, h if gamma is None else gamma, h_out, out, width, eps, h.stride(0),
        d0.stride(0), more.stride(0), h_out.stride(0), out.stride(0), MORE=d1 is not None,
        NORM=gamma is not None, WIDE=power(width), num_warps=_warps(width),
    )  # fmt: skip


def rotary(
    x: torch.Tensor,
    positions: torch.Tensor,
    inverse: torch.Tensor,
    gamma: torch.Tensor | None = None,
    *,
    heads: int,
    head_dim: int,
    start: int,
    dim: int,
    interleaved: bool,
    factor: float = 1.0,
    eps: float = 0.0,
) -> None:
    """x [T, heads * head_dim] with columns [start, start + dim) of every head turned by position *
    inverse f32 [dim / 2] in f32, after the heads' norm where there is gamma [head_dim]. `positions`
    are i64 [T]."""
    pairs = dim // 2
    wide = power(head_dim)
    tile = min(max(1, _NUMBERS // wide), power(heads))
    library.kernels().rotary[len(x), -(-heads // tile)](
        x, inverse if gamma is None else gamma, positions, inverse, len(x), eps, factor,
        x.stride(0), NUMBER=heads, HEAD_DIM=head_dim, START=start, PAIRS=pairs,
        INTERLEAVED=interleaved, NORM=gamma is not None, HEADS=tile, WIDE=wide, HALF=power(pairs),
        num_warps=_warps(tile * wide),
    )  # fmt: skip


def _warps(numbers: int) -> int:
    """Of 32 threads, each with some eight numbers, or more where they are very many."""
    return min(16, max(1, power(numbers) // 256))
