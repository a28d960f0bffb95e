"""Blocks of GGUF against gguf's own dequantisation, bit for bit; NaN and subnormals too."""

from __future__ import annotations

import gguf
import numpy as np
import pytest

from hmc.formats import FORMATS
from hmc.formats.blocks import BLOCKS, put_scale
from hmc.formats.decode import decode
from hmc.formats.ggml import GGML_TYPES
from hmc.formats.gguf import GGUF


def test_types_are_those_of_gguf() -> None:
    for number, kind in GGML_TYPES.items():
        theirs = gguf.GGMLQuantizationType(number)
        assert (kind.name, (kind.block, kind.bytes)) == (theirs.name, gguf.GGML_QUANT_SIZES[theirs])


@pytest.mark.parametrize("row", GGUF, ids=lambda row: row.name)
def test_blocks_mean_what_gguf_says(row) -> None:
    columns, size = row.codes.block
    kind = gguf.GGMLQuantizationType[row.title]
    assert gguf.GGML_QUANT_SIZES[kind] == (columns, size)
    rows, across = 401, 3  # of random bytes: every code, scale and exponent that a byte can hold
    data = np.random.default_rng(size).integers(0, 256, (rows, across * size), np.uint8)
    with np.errstate(invalid="ignore", over="ignore"):
        expected = gguf.dequantize(data, kind)
        found = BLOCKS[row.name](data, across * columns)
    assert found.dtype == np.float32 and found.shape == (rows, across * columns)
    whole = ~np.isnan(expected)
    assert np.array_equal(whole, ~np.isnan(found))
    assert np.array_equal(expected[whole].view(np.uint32), found[whole].view(np.uint32))
    shape = rows, across * columns
    with np.errstate(invalid="ignore", over="ignore"):
        part = decode(FORMATS[row.name], [data], [row.codes.dtypes[0]], shape, 0, 7, 9)
    assert np.array_equal(part, found[7:9], equal_nan=True)


@pytest.mark.parametrize("row", GGUF, ids=lambda row: row.name)
def test_one_number_scales_all_codes_of_a_block(row) -> None:
    columns, size = row.codes.block
    blocks = np.random.default_rng(size).integers(0, 256, (50, size), np.uint8)
    put_scale(row.name, blocks, 1.0)
    once = BLOCKS[row.name](blocks, columns)
    put_scale(row.name, blocks, 0.25)
    assert np.array_equal(BLOCKS[row.name](blocks, columns), once / 4)
    assert 0 < np.abs(once).max() < 1e5
