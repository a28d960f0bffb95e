"""y = x W^T on a device, one function for every stored format; hides how formats become products.

Operands are bf16, sums f32, and stored weights stay intact:

    bf16        the device's own product with f32 result
    f32         f32 product (routers, which are small)
    fp16, fp8,  each weight, times its scale, as the sum of two bf16 numbers: 16 significant bits,
    int4        exact for fp16 and int4, within 2^-17 of fp8's code times f32 scale. Two products
                instead of one; a single bf16 rounding of code times scale would lose 2^-9, as much
                as rounding x, and the kernels on the CPU do not lose it. A part of the rows is
                expanded at a time.
    fp8 on      on devices with block-scaled products (SM90) `torch._scaled_mm`, with x as the sum
    CUDA        of two E4M3 numbers, each with a scale a row and 128 columns: together they keep the
                8 significant bits of bf16 but for values far below their block's largest. On others
                Triton's kernel, where Triton is there, scales each 128 columns' sum (triton_fp8.py)

Callers bound the temporaries by the rows of x they give; `row_bytes` says what one takes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hmc.formats import GROUP, Format, format_of
from hmc.runtime.device_ops import scratch, triton_fp8

_BLOCK, _TILE = 128, 64
_E4M3_LARGEST = 448.0
_BLOCK_SCALED = {(9, 0)}
"""Compute capabilities whose `_scaled_mm` takes a scale for every 128 columns."""


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
        """Rows [first, last) as f32 [n, K]."""
        row = format_of(self.format)
        found = self._codes(row, first, last)
        for plane, scale in zip(row.scales, self.planes[1:], strict=True):
            down, across = plane.elements(self.shape, self.group)
            high = plane.rows or self.shape[0]
            wide = (self.group if plane.columns == GROUP else plane.columns) or self.shape[1]
            start = first // high
            spread = scale.view(down, across)[start : -(-last // high)]
            if high > 1:
                spread = spread.repeat_interleave(high, 0)[first - start * high :]
                spread = spread[: last - first]
            spread = spread.to(torch.float32).repeat_interleave(wide, 1)
            found = found.mul_(spread[:, : self.shape[1]])
        return found

    def _codes(self, row: Format, first: int, last: int) -> torch.Tensor:
        """Values of codes: those of PyTorch's own dtype, or of packed ones by their table."""
        data = self.data[first:last]
        if not row.codes.bits:
            return data.to(torch.float32)
        shifts = torch.arange(0, 8 * data.element_size(), row.codes.bits,
                              device=data.device, dtype=data.dtype)  # fmt: skip
        codes = (data[..., None] >> shifts).bitwise_and_(2**row.codes.bits - 1).flatten(1)
        steps = range(len(row.values))
        if row.values == tuple(row.values[0] + step for step in steps):  # no table: less memory
            return codes.add_(int(row.values[0]))[:, : self.shape[1]].to(torch.float32)
        values = torch.tensor(row.values, dtype=torch.float32, device=data.device)
        return values[codes[:, : self.shape[1]]]


def matmul(x: torch.Tensor, w: Matrix) -> torch.Tensor:
    """f32 [T, N] = x bf16 [T, K] times the transpose of `w`."""
    if w.format == "bf16":
        return product(x, w.data)
    if w.format == "f32":
        return x.to(torch.float32) @ w.data.t()
    form = fp8_form(w, x.device) if w.format == "fp8" else "split"
    if form == "triton":
        return triton_fp8.matmul(x.contiguous(), *w.planes)
    if form == "scaled_mm":
        return _scaled(x, w)
    return _split(x, w)


def row_bytes(w: Matrix, device: torch.device) -> int:
    """Bytes that `matmul` makes on a device for a row of x, its result among them. What it makes of
    `w` keeps to half of `scratch.BYTES`; but on the CPU, bf16 is summed as an f32 copy.
    """
    rows, columns = w.shape
    if w.format == "f32":
        return 4 * rows + 4 * columns
    form = fp8_form(w, device) if w.format == "fp8" else "split"
    if form == "triton":
        return 4 * rows + 2 * columns
    if form == "scaled_mm":
        return max(2 * 4 * rows + 2 * columns, _TERMS * columns)
    own = 4 * rows + (4 * columns if device.type == "cpu" else 0)
    return own if w.format == "bf16" else own + 2 * 4 * min(rows, _expanded(columns))


def _expanded(columns: int) -> int:
    """Rows of a weight that `_split` expands at a time: in f32 with scales, or as f32 with two bf16
    terms (and on the CPU one of them in f32). Products like whole tiles."""
    rows = max(1, scratch.quarter() // ((4 + 2 + 2 + 4) * columns))
    return rows - rows % _TILE if rows > _TILE else rows


def fp8_form(w: Matrix, device: torch.device) -> str:
    """How an fp8 matrix is multiplied on a device: "triton", "scaled_mm" or "split"."""
    if device.type != "cuda":
        return "split"
    whole = w.shape[0] % _BLOCK == 0 and w.shape[1] % _BLOCK == 0
    if whole and torch.cuda.get_device_capability(device) in _BLOCK_SCALED:
        return "scaled_mm"
    return "triton" if triton_fp8.available() else "split"


def product(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """f32 [T, N] = x bf16 [T, K] times the transpose of bf16 [N, K], summed in f32."""
    if x.device.type == "cuda":
        return torch.mm(x, w.t(), out_dtype=torch.float32)
    return x.to(torch.float32) @ w.to(torch.float32).t()


def _split(x: torch.Tensor, w: Matrix) -> torch.Tensor:
    rows, columns = w.shape
    result = x.new_empty((len(x), rows), dtype=torch.float32)
    step = _expanded(columns)
    for first in range(0, rows, step):
        last = min(rows, first + step)
        result[:, first:last] = _exactly(x, w.rows(first, last))
    return result


def _exactly(x: torch.Tensor, exact: torch.Tensor) -> torch.Tensor:
    """f32 [T, n] = x bf16 [T, K] times the transpose of `exact` f32 [n, K], which is used up."""
    high = exact.to(torch.bfloat16)
    low = exact.sub_(high).to(torch.bfloat16)
    return product(x, high).add_(product(x, low))


_TERMS = 4 + 4 + 2 + 1
"""Bytes of an element in `two_terms`: what is left of it, that scaled or as the code has it, two
codes, and scales."""


def two_terms(x: torch.Tensor) -> tuple[tuple[torch.Tensor, torch.Tensor], ...]:
    """x bf16 [T, K] as two E4M3 tensors [T, K], each with f32 scales [T, K / 128]: their scaled sum
    is x.
    """
    left = x.to(torch.float32, copy=True).view(len(x), -1, _BLOCK)
    terms = []
    for _ in range(2):
        # powers of two: scaling back and forth is exact
        largest = left.abs().amax(-1, keepdim=True).clamp_(min=1e-30)
        scale = torch.exp2((largest / _E4M3_LARGEST).log2().ceil())
        codes = (left / scale).to(torch.float8_e4m3fn)
        left.sub_(codes.to(torch.float32).mul_(scale))
        terms.append((codes.view(x.shape), scale[..., 0]))
    return tuple(terms)


def _scaled(x: torch.Tensor, w: Matrix) -> torch.Tensor:
    data, scales = w.planes
    result = None
    for codes, scale in two_terms(x):
        part = torch._scaled_mm(
            codes,
            data.t(),
            scale_a=scale.t().contiguous().t(),  # rows of blocks side by side, as cuBLAS asks
            scale_b=scales.t(),
            out_dtype=torch.float32,
        )
        result = part if result is None else result.add_(part)
    assert result is not None
    return result
