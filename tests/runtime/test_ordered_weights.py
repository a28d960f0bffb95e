"""Weights whose columns have a group each, on their way from a shard to memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hmc.errors import TensorError
from hmc.formats import FORMATS, forms
from hmc.formats.decode import NUMPY, decode
from hmc.runtime.weights.fill import read_spans
from hmc.runtime.weights.tensors import TensorGroup, with_order

N, K, GROUP, EXPERTS = 16, 64, 32, 3
ROW = FORMATS["gptq-order"]
DTYPES = ["I32", "F16", "I32", "I32"]
FORMS = forms(ROW, (N, K), GROUP, DTYPES)
RNG = np.random.default_rng(0)


def experts() -> list[list[np.ndarray[Any, Any]]]:
    """Planes of each expert as they are stored."""
    return [
        [
            RNG.integers(0, 2**32, FORMS[0].stored, np.uint32),
            RNG.uniform(0.5, 2, FORMS[1].stored).astype(np.float16),
            RNG.integers(0, 2**32, FORMS[2].stored, np.uint32),
            RNG.permutation(np.arange(K) // GROUP).astype(np.uint32),
        ]
        for _ in range(EXPERTS)
    ]


def read(path: Path, stored: list[list[Any]]) -> list[list[np.ndarray[Any, Any]]]:
    """What memory holds of each expert's planes."""
    path.write_bytes(b"".join(plane.tobytes() for planes in stored for plane in planes))
    each = sum(form.stored_bytes for form in FORMS)
    groups, places, memory, before = [], {}, [], 0
    for form in FORMS:
        key = ("expert", 5, "gate", form.plane.name)
        offsets = before + each * np.arange(EXPERTS)
        groups.append(TensorGroup(key, ROW.name, form, np.zeros(EXPERTS, np.int64), offsets, K))
        arrays = [np.zeros(form.shape, NUMPY[form.kept]) for _ in range(EXPERTS)]
        places[key] = np.array([array.ctypes.data for array in arrays])
        memory.append(arrays)
        before += form.stored_bytes
    read_spans(with_order(groups), [path], places, None)
    return [list(planes) for planes in zip(*memory, strict=True)]


def test_columns_are_put_back_where_they_were(tmp_path: Path) -> None:
    stored = experts()
    for planes, found in zip(stored, read(tmp_path / "shard", stored), strict=True):
        words, scales, zeros, groups = planes
        columns, rows = np.arange(K), np.arange(N)
        codes = words[columns // 8] >> (4 * (columns % 8)).astype(np.uint32)[:, None] & 15
        zero = (zeros[:, rows // 8] >> (4 * (rows % 8)).astype(np.uint32) & 15) + 1
        wanted = (codes - zero.astype(np.float32)[groups]) * scales.astype(np.float32)[groups]
        values = decode(ROW, found, [form.kept for form in FORMS], (N, K), GROUP)
        np.testing.assert_array_equal(values, wanted.T)


def test_groups_of_other_sizes_are_refused_with_the_weight(tmp_path: Path) -> None:
    stored = experts()
    stored[1][3][:] = 0
    with pytest.raises(TensorError) as error:
        read(tmp_path / "shard", stored)
    assert str(error.value).startswith(f"{tmp_path / 'shard'}: ")
    assert "of expert 1 of layer 5, gate: columns must be of 2 groups, 32 of each" in str(
        error.value
    )
