"""A matrix in f32 -> the tensors that compressed-tensors stores it in; and back, to say what was
lost. Each `Encoding` writes one format of hmc/formats, whose row reads it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hmc.formats import FORMATS, Format, Storage, forms
from hmc.formats.decode import NUMPY, decode

BLOCK = 128
LARGEST_FP8 = 448.0

STEPS = (1.0, 0.96, 0.92, 0.88, 0.84, 0.8)
"""Shares of a group's largest that its range may end at: what is cut off there is made up for by
finer steps. The one with the least squared error is taken."""
_HALVES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
_EVEN_ABOVE = torch.tensor([False, True, False, True, False, True, False])
_EDGES = torch.where(_EVEN_ABOVE, torch.nextafter(_HALVES, torch.zeros(7)), _HALVES)
"""Between which values of E2M1 a number is rounded up; ties go to the even code."""


@dataclass(frozen=True)
class Encoding:
    """`format` is a row of hmc/formats, `storage(group)` the suffixes of its tensors, `planes(w,
    group)` makes them of f32 [n, K]; `config(group)` is what a config group says of the weights,
    `packing` its format. `groups` are those it may have (0: not asked).
    """

    format: str
    packing: str
    groups: tuple[int, ...]
    suffixes: tuple[str, ...]
    planes: Callable[[Tensor, int], tuple[Tensor, ...]]
    config: Callable[[int], dict[str, Any]]

    @property
    def row(self) -> Format:
        """The format's row."""
        return FORMATS[self.format]

    def storage(self, group: int) -> Storage:
        """How its weights lie in the copy."""
        return Storage(self.format, self.suffixes, group if self.row.grouped else 0)

    def shapes(self, shape: tuple[int, int], group: int) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Dtype and shape of each tensor of a weight [n, K]."""
        found = forms(self.row, shape, group if self.row.grouped else 0, self.dtypes)
        return tuple((form.dtype, form.stored) for form in found)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Of the planes, as they are written."""
        return tuple(plane.dtypes[0] for plane in self.row.planes)

    def error(self, w: Tensor, planes: tuple[Tensor, ...], group: int) -> tuple[float, float]:
        """Squares of what was lost and of what there was, summed in f64; by the format's own row,
        so that a copy that says something else than its row reads shows here.
        """
        arrays = [plane.contiguous().view(torch.uint8).numpy() for plane in planes]
        kept = [plane.means(dtype) for plane, dtype in zip(self.row.planes, self.dtypes,
                                                            strict=True)]  # fmt: skip
        views = [array.view(NUMPY[dtype]) for array, dtype in zip(arrays, kept, strict=True)]
        n, k = w.shape
        found = decode(self.row, views, kept, (n, k), group if self.row.grouped else 0)
        lost = (torch.from_numpy(found) - w).double().square().sum()
        return float(lost), float(w.double().square().sum())


def _int4(w: Tensor, group: int) -> tuple[Tensor, ...]:
    """Codes -8 to 7, stored plus 8, eight in a word, the first lowest; a bf16 scale a group."""
    n, k = w.shape
    groups = w.reshape(n, k // group, group)
    largest = groups.abs().amax(-1).clamp_min(torch.finfo(torch.bfloat16).tiny)
    best, scale = torch.full_like(largest, torch.inf), torch.zeros_like(largest)
    for step in STEPS:
        tried = (largest * (step / 7.5)).bfloat16().float()
        codes = (groups / tried[..., None]).round_().clamp_(-8, 7)
        lost = (codes.mul_(tried[..., None]).sub_(groups)).square_().sum(-1)
        better = lost < best
        best, scale = torch.where(better, lost, best), torch.where(better, tried, scale)
    codes = (groups / scale[..., None]).round_().clamp_(-8, 7).add_(8).to(torch.int32)
    nibbles = codes.reshape(n, k // 8, 8)
    words = torch.zeros(n, k // 8, dtype=torch.int32)
    for place in range(8):
        words |= nibbles[..., place] << 4 * place
    return words, scale.bfloat16()


def _mxfp4(w: Tensor, group: int) -> tuple[Tensor, ...]:
    """E2M1 codes, two in a byte, the first lower; an exponent for 32 (OCP Microscaling Formats
    v1.0, section 6.3: that of the largest less that of 4), or the next one where that loses less.
    """
    n, k = w.shape
    groups = w.reshape(n, k // 32, 32)
    largest = groups.abs().amax(-1)
    least = torch.frexp(largest.clamp_min(2.0**-120))[1] - 3  # largest = 2^(e - 1) and more
    best, kept = torch.full_like(largest, torch.inf), torch.zeros_like(least)
    codes = torch.zeros(n, k // 32, 32, dtype=torch.uint8)
    for exponent in (least, least + 1):
        scale = torch.exp2(exponent.float())[..., None]
        tried = torch.bucketize((groups / scale).abs_(), _EDGES, out_int32=True).to(torch.uint8)
        values = torch.tensor(FORMATS["mxfp4"].values[:8])[tried.long()]
        lost = (values * scale - groups.abs()).square_().sum(-1)
        better = lost < best
        best, kept = torch.where(better, lost, best), torch.where(better, exponent, kept)
        codes = torch.where(better[..., None], tried, codes)
    codes = (codes + 8 * (groups < 0).to(torch.uint8)).reshape(n, k // 2, 2)
    return codes[..., 0] | codes[..., 1] << 4, (kept.clamp(-127, 127) + 127).to(torch.uint8)


def _fp8(w: Tensor, group: int) -> tuple[Tensor, ...]:
    """E4M3 codes; an f32 scale for 128 x 128, which puts the largest at 448."""
    n, k = w.shape
    rows, columns = -(-n // BLOCK), -(-k // BLOCK)
    padded = torch.zeros(rows * BLOCK, columns * BLOCK)
    padded[:n, :k] = w
    blocks = padded.reshape(rows, BLOCK, columns, BLOCK)
    scale = blocks.abs().amax((1, 3)).clamp_min(1e-30) / LARGEST_FP8
    codes = (blocks / scale[:, None, :, None]).clamp_(-LARGEST_FP8, LARGEST_FP8)
    codes = codes.to(torch.float8_e4m3fn).reshape(rows * BLOCK, columns * BLOCK)
    return codes[:n, :k].contiguous(), scale


def _weights(**values: Any) -> dict[str, Any]:
    return {"dynamic": False, "symmetric": True, "observer": "minmax", **values}


ENCODINGS: Mapping[str, Encoding] = {
    "int4": Encoding(
        "int4", "pack-quantized", (32, 64, 128), ("_packed", "_scale"), _int4,
        lambda group: _weights(num_bits=4, type="int", strategy="group", group_size=group),
    ),
    "mxfp4": Encoding(
        "mxfp4", "mxfp4-pack-quantized", (32,), ("_packed", "_scale"), _mxfp4,
        lambda group: _weights(
            num_bits=4, type="float", strategy="group", group_size=32, scale_dtype="torch.uint8"
        ),
    ),
    "fp8": Encoding(
        "fp8", "float-quantized", (0,), ("", "_scale"), _fp8,
        lambda group: _weights(
            num_bits=8, type="float", strategy="block", block_structure=[BLOCK, BLOCK]
        ),
    ),
}  # fmt: skip
"""By the name that a command gives them."""
