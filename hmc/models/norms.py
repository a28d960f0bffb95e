"""Norms of hidden states that are arithmetic of a model file: kernels of them follow from it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.blocks import Vector


class LayerNorm(nn.Module):
    """Rows [T, size] less their mean, at a variance of 1, times a weight, and a `bias` if any."""

    def __init__(self, size: int, eps: float, *, bias: bool = False) -> None:
        super().__init__()
        self.eps = eps
        self.weight = Vector(size)
        self.bias = Vector(size) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        apart = x - x.mean(-1, keepdim=True)
        power = apart.square().mean(-1, keepdim=True)
        normed = apart * torch.rsqrt(power + self.eps) * self.weight()
        return normed if self.bias is None else normed + self.bias()  # type: ignore[no-any-return]


class CentredNorm(nn.Module):
    """Each of `groups` chunks of `size` elements at a mean square of 1, times 1 + its weight (one
    for all chunks).
    """

    def __init__(self, size: int, eps: float, groups: int = 1) -> None:
        super().__init__()
        self.size, self.eps, self.groups = size, eps, groups
        self.weight = Vector(size)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.reshape(-1, self.groups, self.size) if self.groups > 1 else x
        power = parts.square().mean(-1, keepdim=True)
        normed = parts * torch.rsqrt(power + self.eps) * (1.0 + self.weight())
        return normed.flatten(-2) if self.groups > 1 else normed  # type: ignore[no-any-return]


def unit(x: Tensor, eps: float) -> Tensor:
    """Rows, or rows by head, less their length: at a mean square of 1."""
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
