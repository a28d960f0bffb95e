"""Formats that only tests have, for decoders made from planes, and random weights of any row."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from e5m2 import E5M2_ROWS

from hmc.formats import (
    GROUP,
    WHOLE,
    Format,
    Plane,
    forms,
    kernel_params,
    minifloats,
)
from hmc.formats.decode import NUMPY, decode

FOUR_BITS = Format(
    name="e2m1_groups",
    title="FP4",
    planes=(
        Plane("codes", ("U8",), ("_packed",), bits=4),
        Plane("scale", ("F8_E8M0",), ("_scale",), columns=GROUP, ragged=False, kept=("F32",)),
    ),
    exact_in=("bf16", "f32"),
    about="FP4 E2M1, one scale per {group} columns",
    values=tuple(
        sign * value for sign in (1.0, -1.0) for value in (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
    ),
)
BLOCKS = Format(
    name="e5m2_blocks",
    title="FP8 E5M2",
    planes=(
        Plane("codes", ("F8_E5M2",)),
        Plane("scale", ("F32",), ("_scale_inv",), 64, 64, kept=("F32",)),
    ),
    exact_in=("f32",),
    about="FP8 E5M2, 64x64 scales",
    values=minifloats(5, 2, infinities=True),
)
TENSOR = Format(
    name="bf16_tensor",
    title="BF16, scaled",
    planes=(
        Plane("codes", ("BF16",)),
        Plane("scale", ("F32",), ("_scale",), WHOLE, WHOLE, kept=("F32",)),
    ),
    exact_in=("f32",),
    about="BF16, one scale",
)
ROWS = (E5M2_ROWS, FOUR_BITS, BLOCKS, TENSOR)


@dataclass(frozen=True)
class Made:
    """A random weight: its planes in memory and its values, f32 [n, k]."""

    planes: tuple[npt.NDArray[Any], ...]
    values: npt.NDArray[np.float32]
    params: dict[str, int]


def made(rng: np.random.Generator, row: Format, n: int, k: int, group: int = 0) -> Made:
    """A random weight of finite codes, as kernels read it."""
    dtypes = [plane.dtypes[0] for plane in row.planes]
    found = []
    for form in forms(row, (n, k), group, dtypes):
        kind = NUMPY[form.kept]
        if form.plane is not row.codes:
            plane = rng.uniform(0.5, 2.0, form.shape).astype(kind)
        elif not row.values:
            values = rng.standard_normal(form.shape).astype(np.float32)
            plane = (values.view(np.uint32) >> 16).astype(kind)
        elif row.codes.bits:
            plane = rng.integers(0, 256, form.shape).astype(kind)
        else:
            sound = np.flatnonzero(np.abs(np.array(row.values)) < 1e3)
            plane = rng.choice(sound, form.shape).astype(kind)
        found.append(plane)
    kept = [form.kept for form in forms(row, (n, k), group, dtypes)]
    values = decode(row, found, kept, (n, k), group)
    return Made(tuple(found), values, kernel_params(row, group, dtypes))
