"""Host memory as PyTorch sees it: what devices copy from and work on."""

from __future__ import annotations

import ctypes
from math import prod

import torch


def view(address: int, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor over memory at `address` that somebody else owns."""
    count = prod(shape)
    raw = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(address)
    return torch.frombuffer(raw, dtype=dtype, count=count).view(shape)
