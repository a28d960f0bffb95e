"""Random stored weights as launches take them, and what they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from hmc.formats import Format, forms
from hmc.formats.decode import NUMPY, decode
from hmc.runtime.device_ops.triton.launch import Weight
from hmc.runtime.weights.torch_view import TORCH

_HELD = {1: np.uint8, 2: np.int16, 4: np.int32}


def of_planes(
    row: Format,
    planes: Sequence[Any],
    dtypes: Sequence[str],
    shape: tuple[int, int],
    group: int = 0,
) -> tuple[Weight, torch.Tensor]:
    """Of arrays of `NUMPY[dtype]`: the weight, and its values in f64 [rows, columns]."""
    tensors = [
        torch.from_numpy(np.ascontiguousarray(plane).view(_HELD[plane.itemsize])).view(TORCH[dtype])
        for plane, dtype in zip(planes, dtypes, strict=True)
    ]
    values = decode(row, planes, dtypes, shape, group)
    return Weight.of(tensors, row.name, shape, group), torch.from_numpy(values).double()


def random_weight(
    row: Format, rows: int, columns: int, seed: int = 0
) -> tuple[Weight, torch.Tensor]:
    """The same of finite codes, and scales about 1; groups of 32 where a format has groups."""
    rng = np.random.default_rng([seed, rows, columns])
    group = 32 if row.grouped else 0
    dtypes, planes = [], []
    for form in forms(row, (rows, columns), group, [plane.dtypes[0] for plane in row.planes]):
        if form.plane.kind == "zero":
            least = int(min(0, *row.values)) if row.code_bits == 8 else 0
            zeros = rng.integers(least, least + 2**row.code_bits + 1, form.shape)
            plane = _floats(zeros, form.kept)
        elif form.plane is not row.codes:
            plane = _floats(rng.uniform(0.5, 2.0, form.shape), form.kept)
        elif not row.values:
            plane = _floats(rng.standard_normal(form.shape), form.kept)
        elif row.codes.bits:
            words = rng.integers(0, 2**32, form.shape, dtype=np.uint32)
            plane = words.astype(NUMPY[form.kept])
        else:
            sound = np.flatnonzero(np.abs(np.array(row.values)) < 1e3)
            plane = rng.choice(sound, form.shape).astype(NUMPY[form.kept])
        planes.append(plane)
        dtypes.append(form.kept)
    return of_planes(row, planes, dtypes, (rows, columns), group)


def random_x(tokens: int, columns: int, seed: int = 0) -> torch.Tensor:
    """bf16 [tokens, columns]."""
    seeded = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, columns, generator=seeded).to(torch.bfloat16)


def _floats(values: Any, dtype: str) -> Any:
    found = values.astype(np.float32)
    if dtype in ("F8_E4M3", "F8_E8M0"):  # powers of two about 1
        exponents = np.floor(np.log2(found)).astype(np.int64)
        return ((exponents + 7) << 3 if dtype == "F8_E4M3" else exponents + 127).astype(np.uint8)
    if dtype == "BF16":
        return (found.view(np.uint32) >> 16).astype(np.uint16)
    return found.astype(NUMPY[dtype])
