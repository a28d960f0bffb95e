"""Host memory as PyTorch sees it: what devices copy from and work on."""

from __future__ import annotations

import ctypes
from math import prod

import torch

TORCH = {
    "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I32": torch.int32,
    "I8": torch.int8, "U8": torch.uint8, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
}  # fmt: skip
"""Dtypes of safetensors, as far as planes of formats have them in memory."""
NAMES = {kind: name for name, kind in TORCH.items()}


def view(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over memory at `address` that somebody else owns."""
    count = prod(shape)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype, count=count).view(shape)
