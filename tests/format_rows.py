"""Formats that only tests have, for decoders made from planes, and random weights of any row."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
from e5m2 import E5M2_ROWS

from hmc.formats import GROUP, WHOLE, Form, Format, Plane, forms, kernel_params, minifloats
from hmc.formats.blocks import HALVES_AT
from hmc.formats.decode import NUMPY, decode, floats

Keep = Callable[[npt.NDArray[Any]], npt.NDArray[Any]]

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
TWICE = Format(
    name="e4m3_twice",
    title="FP8, scaled twice",
    planes=(
        Plane("codes", ("F8_E4M3",)),
        Plane("block", ("BF16",), ("_scale",), 64, 64, kept=("F32",)),
        Plane("row", ("F32",), ("_scale_2",), 1, WHOLE, kept=("F32",)),
    ),
    exact_in=("f32",),
    about="FP8 E4M3, 64x64 scales and one a row",
    values=minifloats(4, 3, infinities=False),
)
ROWS = (E5M2_ROWS, FOUR_BITS, BLOCKS, TENSOR)


@dataclass(frozen=True)
class Made:
    """A random weight: its planes in memory, its values, f32 [n, k], and what kernels must know of
    it; `beside` as kernels find what lies beside the codes.
    """

    planes: tuple[npt.NDArray[Any], ...]
    values: npt.NDArray[np.float32]
    params: dict[str, int]
    table: npt.NDArray[np.int64]

    @property
    def codes(self) -> int:
        """Address of the codes."""
        return int(self.planes[0].ctypes.data)

    @property
    def beside(self) -> int:
        """Address of the plane beside the codes, or of the addresses of all of them."""
        if len(self.table) < 2:
            return int(self.table[0]) if len(self.table) else 0
        return int(self.table.ctypes.data)


def made(
    rng: np.random.Generator, row: Format, n: int, k: int, group: int = 0,
    dtypes: tuple[str, ...] = (), keep: Keep = np.ascontiguousarray,
) -> Made:  # fmt: skip
    """A random weight of finite codes, as kernels read it: every plane as `keep` holds it."""
    stored = dtypes or tuple(plane.dtypes[0] for plane in row.planes)
    each = forms(row, (n, k), group, stored)
    found = tuple(keep(_plane(rng, row, form, k)) for form in each)
    kept = [form.kept for form in each]
    values = decode(row, found, kept, (n, k), group)
    table = np.array([plane.ctypes.data for plane in found[1:]], np.int64)
    return Made(found, values, kernel_params(row, group, stored), table)


def _plane(rng: np.random.Generator, row: Format, form: Form, k: int) -> npt.NDArray[Any]:
    kind, plane = NUMPY.get(form.kept, np.dtype(np.uint8)), form.plane
    if plane.block[1]:
        return _blocks(rng, row, form.shape)
    if plane.kind == "order":
        return rng.permutation(k).reshape(form.shape).astype(kind)
    if plane is not row.codes:
        zero = plane.kind == "zero"
        values = rng.integers(1, 2**row.code_bits, form.shape) if zero else None
        return encoded(rng.uniform(0.5, 2.0, form.shape) if values is None else values, form.kept)
    if not row.values:
        return encoded(rng.standard_normal(form.shape), form.kept)
    if row.codes.bits:
        most = 2 ** (8 * kind.itemsize)
        return rng.integers(0, most, form.shape, dtype=np.uint64).astype(kind)
    return rng.choice(np.flatnonzero(np.abs(np.array(row.values)) < 1e3), form.shape).astype(kind)


def encoded(values: npt.NDArray[Any], dtype: str) -> npt.NDArray[Any]:
    """Positive numbers in a dtype of floats, rounded, as numpy holds it."""
    single = values.astype(np.float32)
    if dtype == "BF16":
        return (single.view(np.uint32) >> 16).astype(np.uint16)
    if dtype.startswith("F8"):
        every = floats(np.arange(255, dtype=np.uint8), dtype)
        return np.nanargmin(np.abs(every - single[..., None]), -1).astype(np.uint8)
    return single.astype(NUMPY[dtype])


def _blocks(rng: np.random.Generator, row: Format, shape: tuple[int, ...]) -> npt.NDArray[np.uint8]:
    """Blocks of random bytes, but for their floats, which are near 1."""
    blocks = rng.integers(0, 256, shape, dtype=np.uint8).reshape(-1, row.codes.block[1])
    for at in HALVES_AT.get(row.name, ()):
        halves = rng.uniform(0.5, 2.0, (len(blocks), 1)).astype(np.float16)
        blocks[:, at : at + 2] = halves.view(np.uint8)
    if row.name not in HALVES_AT:
        blocks[:, 0] = rng.integers(124, 131, len(blocks))
    return blocks.reshape(shape)
