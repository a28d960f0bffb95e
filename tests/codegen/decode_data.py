"""Guarded weights of the decode matmuls in every format, and what kernels must know of them."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from kernel_calls import address, guarded
from prefill_data import Stored, from_bf16, in_whole_numbers, stored

from hmc.codegen.formats.block_dot import BlockDot
from hmc.codegen.formats.forms import dot_of
from hmc.codegen.formats.whole import WholeDot
from hmc.codegen.spec import KernelSpec, WeightFormat

__all__ = ["address_of_scale", "as_multiplied", "bound", "stored_as", "weights"]


def weights(
    rng: np.random.Generator,
    weight: WeightFormat,
    n: int,
    k: int,
    group: int = 128,
    scale_dtype: int = 0,
) -> Stored:
    """A random matrix whose weights and scales end where an unreadable page begins."""
    found = stored(rng, weight, n, k, group)
    scale = found.scale
    if weight == "int4" and scale_dtype == 1:
        scale = from_bf16(scale).astype(np.float32)
    return replace(found, data=guarded(found.data), scale=guarded(scale))


def stored_as(spec: KernelSpec, group: int = 128, scale_dtype: int = 0) -> KernelSpec:
    """`spec` with the parameters that only int4 has."""
    if spec.weight != "int4":
        return spec
    params = {**dict(spec.params), "group": group, "scale_dtype": scale_dtype}
    return replace(spec, params=tuple(sorted(params.items())))


def address_of_scale(matrix: Stored, weight: WeightFormat) -> int:
    """0 for formats without scales."""
    return address(matrix.scale) if weight in ("fp8", "int4") else 0


def as_multiplied(spec: KernelSpec, x: np.ndarray) -> np.ndarray:
    """Activations x [T, K] as the kernel's form multiplies them: themselves, or (whole.py) rounded
    to multiples of a share of a chunk's largest.
    """
    dot = dot_of(spec, x.shape[1])
    if isinstance(dot, BlockDot):
        return in_whole_numbers(x, dot.chunk, dot.largest)
    return in_whole_numbers(x, dot.chunk) if isinstance(dot, WholeDot) else x


def bound(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """How far f32 sums of x [T, K] w [N, K] may be off: 2e-6 of the sum of magnitudes."""
    limit: np.ndarray = 2e-6 * (np.abs(x) @ np.abs(w).T) + 1e-30
    return limit
