"""Rows of formats: sizes, meaning, what is refused, and how a format of one's own is found."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from format_rows import BLOCKS, E5M2_ROWS, FOUR_BITS, ROWS, TENSOR, made

from hmc.errors import UnsupportedError
from hmc.formats import (
    FORMATS,
    Format,
    format_of,
    forms,
    kernel_params,
    minifloats,
    register,
    registered,
)
from hmc.formats.decode import decode


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    """The formats of tests are formats."""
    with registered(*ROWS):
        yield


@pytest.mark.parametrize(
    ("name", "shape", "group", "dtypes", "stored", "memory"),
    [
        ("bf16", (7,), 0, ("BF16",), [14], [14]),
        ("f32", (3, 5), 0, ("F32",), [60], [60]),
        ("fp8", (200, 300), 0, ("F8_E4M3", "BF16"), [60_000, 12], [60_000, 24]),
        ("fp8", (128, 128), 0, ("F8_E4M3", "F32"), [16384, 4], [16384, 4]),
        ("int4", (3, 96), 32, ("I32", "BF16"), [144, 18], [144, 18]),
        ("int4", (3, 96), 32, ("I32", "F16"), [144, 18], [144, 18]),
        ("e5m2_rows", (5, 31), 0, ("F8_E5M2", "BF16"), [155, 10], [155, 20]),
        ("e2m1_groups", (4, 64), 32, ("U8", "F8_E8M0"), [128, 8], [128, 32]),
        ("bf16_tensor", (4, 6), 0, ("BF16", "F32"), [48, 4], [48, 4]),
    ],
)
def test_bytes_follow_from_planes(
    name: str,
    shape: tuple[int, ...],
    group: int,
    dtypes: tuple[str, ...],
    stored: list[int],
    memory: list[int],
) -> None:
    found = forms(format_of(name), shape, group, dtypes)
    assert [form.stored_bytes for form in found] == stored
    assert [form.bytes for form in found] == memory


@pytest.mark.parametrize(
    ("name", "shape", "group", "dtypes", "problem"),
    [
        ("fp8", (4, 4), 0, ("F8_E4M3",), "1 planes, fp8 has 2"),
        ("fp8", (4, 4), 0, ("F8_E5M2", "F32"), "fp8 codes in F8_E5M2"),
        ("fp8", (4, 4), 128, ("F8_E4M3", "F32"), "groups of 128"),
        ("fp8", (4,), 0, ("F8_E4M3", "F32"), "two dimensions"),
        ("int4", (4, 40), 32, ("I32", "BF16"), "whole groups"),
        ("int4", (4, 32), 0, ("I32", "BF16"), "groups of 0"),
    ],
)
def test_what_a_format_does_not_have_is_refused(
    name: str, shape: tuple[int, ...], group: int, dtypes: tuple[str, ...], problem: str
) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        forms(format_of(name), shape, group, dtypes)
    with pytest.raises(UnsupportedError, match="weight format 'q9': there are fp8"):
        format_of("q9")


def test_a_registered_format_goes_again() -> None:
    assert "e5m2_rows" in FORMATS
    extra = Format("extra", "", E5M2_ROWS.planes, ("f32",))
    with registered(extra):
        assert format_of("extra") is extra
    assert "extra" not in FORMATS


def test_kernel_params() -> None:
    assert kernel_params(FORMATS["fp8"], 0, ("F8_E4M3", "BF16")) == {}
    assert kernel_params(FORMATS["int4"], 32, ("I32", "BF16")) == {"group": 32, "scale_dtype": 0}
    assert kernel_params(FORMATS["int4"], 32, ("I32", "F16")) == {"group": 32, "scale_dtype": 2}
    assert kernel_params(FOUR_BITS, 32, ("U8", "F8_E8M0")) == {"group": 32}


def test_a_name_is_taken_once() -> None:
    register(E5M2_ROWS)  # is there already
    with pytest.raises(ValueError, match="weight format fp8 already"):
        register(Format("fp8", "", E5M2_ROWS.planes, ("f32",)))


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (torch.float8_e4m3fn, minifloats(4, 3, infinities=False)),
        (torch.float8_e5m2, minifloats(5, 2, infinities=True)),
    ],
)
def test_small_floats_are_those_of_pytorch(kind: torch.dtype, values: tuple[float, ...]) -> None:
    expected = torch.arange(256, dtype=torch.uint8).view(kind).to(torch.float32)
    np.testing.assert_array_equal(np.array(values, np.float32), expected.numpy())


@pytest.mark.parametrize("row", [E5M2_ROWS, BLOCKS, TENSOR, FOUR_BITS])
def test_rows_are_slices_of_the_whole(row: Format) -> None:
    group = 32 if row.grouped else 0
    made_ = made(np.random.default_rng(1), row, 130, 96, group)
    kept = ["F32" if plane is not row.codes else plane.dtypes[0] for plane in row.planes]
    part = decode(row, made_.planes, kept, (130, 96), group, 63, 67)
    np.testing.assert_array_equal(part, made_.values[63:67])
