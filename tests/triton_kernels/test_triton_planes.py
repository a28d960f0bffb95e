"""What kernels make of stored codes is exact: products with the unit matrix are the weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from e5m2 import E5M2_ROWS
from format_rows import FOUR_BITS, TENSOR
from triton_weights import of_planes, random_weight, random_x

from hmc.errors import UnsupportedError
from hmc.formats import FORMATS, Format, Plane, format_of, registered
from hmc.formats.decode import NUMPY
from hmc.runtime.device_ops.triton.launch import Weight, Workspace, matmul

TWO_BITS = Format("two_bits", "2 bits", (Plane("codes", ("U8",), bits=2),), ("f32",),
                  values=(-1.1, 0.0, 1e-3, 7.0))  # fmt: skip
"""A table of values that are no bf16 numbers."""
_ZERO = Plane("zero", ("BF16",), columns=-1, ragged=False, kind="zero")
OFF_LINE = Format("off_line", "zeros", (Plane("codes", ("U8",), bits=2), _ZERO), ("f32",),
                  values=TWO_BITS.values)  # fmt: skip
"""The same, less zeros."""


def of_eye(weight: Weight, work: Workspace) -> torch.Tensor:
    return matmul(torch.eye(weight.columns).to(torch.bfloat16), weight, work).t()


@pytest.mark.parametrize("row", [format_of("fp8"), E5M2_ROWS], ids=lambda row: row.name)
def test_every_code_of_an_eight_bit_float(row: Format, work: Workspace) -> None:
    codes = np.arange(256, dtype=np.uint8).reshape(16, 16)
    odd = ~np.isfinite(np.array(row.values, np.float32)).reshape(16, 16)
    scale = np.full((16, 1) if row is E5M2_ROWS else (1, 1), 0.375, np.float32)
    dtypes = [row.codes.dtypes[0], "F32"]
    with registered(row):
        weight, values = of_planes(row, (np.where(odd, 0, codes), scale), dtypes, (16, 16))
        assert torch.equal(of_eye(weight, work).double(), values)
        # what is no number makes its row none, and no other
        weight, _ = of_planes(row, (codes, scale), dtypes, (16, 16))
        found = of_eye(weight, work).isfinite()
    assert torch.equal(found.all(1), torch.from_numpy(~odd.any(1)))


READ = [row for row in FORMATS.values() if not row.read_as and not row.codes.block[1]
        and all(plane.kind != "order" for plane in row.planes)]  # fmt: skip


@pytest.mark.few(14)
@pytest.mark.parametrize("row", [*READ, TWO_BITS, OFF_LINE], ids=lambda row: row.name)
def test_random_codes(row: Format, work: Workspace) -> None:
    """Rows that no tile divides, and columns in cut blocks where a format has them."""
    with registered(row):
        weight, values = random_weight(row, 9, 64 if row.grouped else 80)
        assert torch.equal(of_eye(weight, work), values.float())


def test_small_and_large_halves(work: Workspace) -> None:
    bits = np.array([0, 1, 2, 0x3FF, 0x400, 0x7BFF, 0x8001, 0xFBFF] * 2, np.uint16)
    row = format_of("fp16")
    weight, values = of_planes(row, [bits.view(NUMPY["F16"])], ["F16"], (1, 16))
    assert torch.equal(of_eye(weight, work).double(), values)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F8_E8M0", "F8_E4M3"])
def test_scales_of_every_dtype(dtype: str, work: Workspace) -> None:
    planes = (FOUR_BITS.planes[0], Plane("scale", (dtype,), columns=-1, ragged=False))
    row = Format(f"scaled_by_{dtype}", "", planes, ("f32",), values=FOUR_BITS.values)
    rng = np.random.default_rng(1)
    size = NUMPY[dtype].itemsize
    words = rng.integers(1, 120, (5, 2)).astype(np.uint8) if size == 1 else None
    scale = np.array([[0x3F80, 0x4012]] * 5, np.uint16) if words is None else words
    codes = rng.integers(0, 256, (5, 32)).astype(np.uint8)
    with registered(row):
        weight, values = of_planes(
            row, (codes, scale.view(NUMPY[dtype])), ["U8", dtype], (5, 64), 32
        )
        assert torch.equal(of_eye(weight, work), values.float())


def test_an_outer_scale(work: Workspace) -> None:
    """A format whose scales are scaled."""
    planes = (*FORMATS["fp8"].planes, Plane("outer", ("F32",), rows=0, columns=0))
    row = Format("twice", "", planes, ("bf16",), values=FORMATS["fp8"].values)
    codes, scale = np.arange(80, dtype=np.uint8).reshape(5, 16), np.full((1, 1), 3.0, np.float32)
    with registered(row, TENSOR):
        dtypes = ["F8_E4M3", "F32", "F32"]
        weight, values = of_planes(row, (codes, scale, scale / 4), dtypes, (5, 16))
        assert torch.equal(of_eye(weight, work).double(), values)


def test_what_tensor_cores_cannot_scale_is_refused() -> None:
    planes = (FORMATS["fp8"].planes[0], Plane("scale", ("F32",), columns=8))
    row = Format("eights", "", planes, ("bf16",), values=FORMATS["fp8"].values)
    with registered(row), pytest.raises(UnsupportedError, match="every 8 columns"):
        random_weight(row, 8, 16)
    assert random_x(1, 8).shape == (1, 8)
