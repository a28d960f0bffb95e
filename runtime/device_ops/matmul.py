"""y = x W^T on a device that the CPU plays, one function for every stored format: weights are
expanded to f32, a part of the rows at a time, and products and sums are f32. (On GPUs it is hmc's
Triton kernels: runtime/device_ops/triton.)

Callers bound the temporaries by the rows of x they give; `row_bytes` says what one takes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from hmc.formats import format_of
from hmc.formats.decode import NUMPY, decode
from hmc.runtime.device_ops import scratch
from hmc.runtime.weights.torch_view import NAMES

_TILE = 64

EXPANDED = 4 + 4 + 4
"""Bytes of a weight that is expanded: in f32, with codes and scales before they are one."""


@dataclass(frozen=True)
class Matrix:
    """A stored weight [N, K] on a device: its planes as kernels read them, in the order of the
    format's row (hmc/formats); `group` columns share a scale where the format leaves that open.
    """

    planes: tuple[torch.Tensor, ...]
    format: str
    shape: tuple[int, int]
    group: int = 0

    @property
    def data(self) -> torch.Tensor:
        """The codes."""
        return self.planes[0]

    def rows(self, first: int, last: int) -> torch.Tensor:
        """Rows [first, last) as f32 [n, K], of a GPU's planes by way of the host; of planes without
        memory, without values."""
        if self.data.is_meta:
            return self.data.new_empty((last - first, self.shape[1]), dtype=torch.float32)
        kept = [NAMES[plane.dtype] for plane in self.planes]
        planes = [plane.contiguous().view(torch.uint8).cpu().numpy().view(NUMPY[dtype])
                  for plane, dtype in zip(self.planes, kept, strict=True)]  # fmt: skip
        row = format_of(self.format)
        found = torch.from_numpy(decode(row, planes, kept, self.shape, self.group, first, last))
        return found.to(self.data.device)

    def picked(self, rows: torch.Tensor) -> torch.Tensor:
        """Rows by number, [n, K], of a format of one plane: numbers as stored, blocks as f32."""
        codes = self.data[rows]
        if not format_of(self.format).codes.block[1]:
            return codes
        return replace(self, planes=(codes,), shape=(len(rows), self.shape[1])).rows(0, len(rows))


@dataclass(frozen=True)
class Expert:
    """gate (or None), up and down of a routed expert, and their biases as stored, or none."""

    gate: Matrix | None
    up: Matrix
    down: Matrix
    biases: tuple[torch.Tensor, ...] = ()

    @property
    def into(self) -> tuple[Matrix, ...]:
        """The matrices whose products are activated."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


def matmul(x: torch.Tensor, w: Matrix) -> torch.Tensor:
    """f32 [T, N] = x bf16 [T, K] times the transpose of `w`."""
    rows, columns = w.shape
    result = x.new_empty((len(x), rows), dtype=torch.float32)
    left, step = x.to(torch.float32), _expanded(columns)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        result[:, first:last] = left @ w.rows(first, last).t()
    return result


def row_bytes(w: Matrix) -> int:
    """Bytes that `matmul` makes for a row of x: its result and the row in f32. What it makes of `w`
    keeps to half of `scratch.BYTES`, and so does a part of the result.
    """
    rows, columns = w.shape
    return 4 * rows + 4 * columns + 4 * min(rows, _expanded(columns))


def _expanded(columns: int) -> int:
    """Rows of a weight that are expanded at a time. Products like whole tiles."""
    rows = max(1, scratch.quarter() // (EXPANDED * columns))
    return rows - rows % _TILE if rows > _TILE else rows
