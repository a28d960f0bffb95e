"""Random weights that look like trained ones, in every format, made from its planes.

Tensors are slices of one pattern per plane at varied places, copied at memory speed: what counts
for a benchmark is that values are spread as in a real model (no zeros, NaN or subnormals to be fast
or slow on), that no two experts are equal, and that the same plan gives the same weights. Codes of
many bits are those of a Gaussian scaled to a block's largest; those of few are drawn evenly. The
last scale brings a weight's std to 1/sqrt(fan_in), others are 1.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.formats import DTYPE_BITS, Form, Format, format_of
from hmc.formats.blocks import BLOCKS, put_scale
from hmc.formats.decode import floats
from hmc.runtime.weights.tensors import TensorGroup

_PATTERN = 1 << 24  # elements
_STDS = 4.0  # a block of 16384 Gaussian values has its largest near 4 standard deviations
_FEW = 5  # bits of codes that are drawn evenly
_EXPERTS = 8  # that tables of experts name

Array = npt.NDArray[Any]


class Patterns:
    """Values to cut tensors from, one array per format, plane, dtype and fan-in."""

    def __init__(self) -> None:
        self._gauss = np.random.default_rng(0).standard_normal(_PATTERN, np.float32)
        self._known: dict[tuple[str, str, str, int], Array] = {}

    def of(self, group: TensorGroup) -> Array:
        """Elements as unsigned integers of their size, as kernels read them."""
        key = (group.format, group.form.plane.name, group.form.kept, group.fan_in)
        if key not in self._known:
            self._known[key] = self._make(format_of(group.format), group.form, group.fan_in)
        return self._known[key]

    def _make(self, row: Format, form: Form, fan_in: int) -> Array:
        std = (fan_in or 1) ** -0.5
        if form.plane.block[1]:
            return self._blocks(row, std)
        if form.plane is not row.codes:
            return self._beside(row, form, std)
        if row.codes.dtypes == ("I64",):  # experts that every model has
            return _bits((np.arange(_PATTERN) % _EXPERTS).astype(np.float32), form.kept)
        if not row.values:
            # Vectors are gains of norms or biases: near 1 is harmless for both.
            return _bits(
                self._gauss * np.float32(std) if fan_in else 1 + 0.05 * self._gauss, form.kept
            )
        if row.code_bits < _FEW:
            return self._gauss.view(np.uint8)[0::4]  # the lowest mantissa bits: uniform
        return _nearest_codes(row, self._gauss)

    def _beside(self, row: Format, form: Form, std: float) -> Array:
        """Scales, zeros, the order of columns."""
        if form.plane.kind == "order":
            return np.random.default_rng(0).permutation(form.shape[1]).astype(np.uint32)
        if form.plane.kind == "zero":
            return _bits(np.full(4096, 2 ** (row.code_bits - 1), np.float32), form.kept)
        last = [plane for plane in row.scales if plane.kind == "scale"][-1]
        value = std / self._code_std(row) if form.plane is last else 1.0
        return _bits(np.full(4096, value, np.float32), form.kept)

    def _blocks(self, row: Format, std: float) -> Array:
        """Whole blocks: random bytes, but for the floats, which bring the values' std to `std`."""
        columns, size = row.codes.block
        blocks = self._gauss.view(np.uint8)[0::4][: _PATTERN // size * size].reshape(-1, size)
        blocks = np.ascontiguousarray(blocks)
        put_scale(row.name, blocks, 1.0)
        spread = float(BLOCKS[row.name](blocks[:64], columns).std())
        put_scale(row.name, blocks, std / spread)
        return blocks.reshape(-1).view(np.dtype((np.void, size)))

    def _code_std(self, row: Format) -> float:
        finite = _finite(row)[1]
        return float(finite.std() if row.code_bits < _FEW else finite.max() / _STDS)


def _finite(row: Format) -> tuple[Array, Array]:
    """Codes that are finite numbers, ascending by value, and their values."""
    values = np.array(row.values)
    codes = np.flatnonzero(np.isfinite(values))
    codes = codes[np.argsort(values[codes], kind="stable")]
    return codes, values[codes]


def _nearest_codes(row: Format, gauss: Array) -> Array:
    """Codes nearest to Gaussian values of which `_STDS` are the largest: by a table of 2^16 steps,
    since there are many values.
    """
    codes, values = _finite(row)
    steps = np.linspace(-1, 1, 1 << 16) * values[-1]
    middles = (values[1:] + values[:-1]) / 2
    table = codes[np.searchsorted(middles, steps)].astype(np.uint8)
    at = np.clip((gauss / _STDS + 1) * ((1 << 15) - 0.5), 0, (1 << 16) - 1)
    found: Array = table[at.astype(np.uint16)]
    return found


def _bits(values: Array, dtype: str) -> Array:
    """f32 values rounded to a dtype, as unsigned integers."""
    bits: Array = values.astype(np.float32).view(np.uint32)
    if dtype == "F32":
        return bits
    if dtype == "F16":
        bits = values.astype(np.float16).view(np.uint16)
        return bits
    if dtype == "BF16":
        bits = bits + (0x7FFF + (bits >> 16 & 1)) >> 16
        return bits.astype(np.uint16)
    every = floats(np.arange(2 ** DTYPE_BITS[dtype], dtype=np.uint8), dtype)
    order = np.argsort(every)  # NaN last
    at = np.searchsorted(every[order], values).clip(0, np.isfinite(every).sum() - 1)
    found: Array = order[at].astype(np.uint8)
    return found
