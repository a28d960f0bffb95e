"""x bf16 times block-scaled FP8 weights as a Triton kernel; Triton is optional, and asked for only
by CUDA devices without a block-scaled product of their own.

One program makes a tile of y. E4M3 codes are exact in bf16, so each 128 columns' product is that of
the CPU kernels, and their f32 sum is scaled by the block's scale before it is added up.
"""

from __future__ import annotations

import importlib
import importlib.util
from functools import cache
from typing import Any

import torch

_ROWS, _COLUMNS, _DEPTH = 64, 128, 128

tl: Any = None
"""triton.language, once the kernel has been asked for: its body is compiled with this module's
globals."""


@cache
def available() -> bool:
    """Whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def matmul(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """f32 [T, N] = x bf16 [T, K] times the transpose of codes fp8 [N, K] with scales f32
    [ceil(N/128), ceil(K/128)]; all contiguous, on one CUDA device.
    """
    tokens, depth = x.shape
    rows = len(codes)
    y = torch.empty((tokens, rows), dtype=torch.float32, device=x.device)
    grid = (-(-tokens // _ROWS), -(-rows // _COLUMNS))
    _kernel()[grid](
        x, codes, scale, y, tokens, rows, depth, scale.shape[1], _ROWS, _COLUMNS, _DEPTH
    )
    return y


@cache
def _kernel() -> Any:
    globals()["tl"] = importlib.import_module("triton.language")
    return importlib.import_module("triton").jit(_fp8_block_matmul)


def _fp8_block_matmul(  # type: ignore[no-untyped-def]
    x,
    w,
    scale,
    y,
    tokens,
    rows,
    depth,
    blocks,
    TOKENS: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    row = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    total = tl.zeros((TOKENS, ROWS), tl.float32)
    for block in range(blocks):
        column = block * DEPTH + tl.arange(0, DEPTH)
        inside = column < depth
        left = tl.load(
            x + token[:, None].to(tl.int64) * depth + column[None, :],
            (token < tokens)[:, None] & inside[None, :],
            0.0,
        )
        right = tl.load(
            w + row[None, :].to(tl.int64) * depth + column[:, None],
            (row < rows)[None, :] & inside[:, None],
            0.0,
        )
        factor = tl.load(scale + tl.program_id(1) * blocks + block)
        total += tl.dot(left, right.to(tl.bfloat16)) * factor
    tl.store(
        y + token[:, None].to(tl.int64) * rows + row[None, :],
        total,
        (token < tokens)[:, None] & (row < rows)[None, :],
    )
