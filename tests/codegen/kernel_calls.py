"""Calls of the kernels between the matmuls: guarded arrays, workers in turn, stored vectors in
every format.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import numpy as np
from prefill_data import address, bf16, from_bf16

from hmc.codegen.arguments import pack
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec, WeightFormat

_LIBC = ctypes.CDLL(None, use_errno=True)


def guarded(array: np.ndarray) -> np.ndarray:
    """A copy of `array` that ends where an unreadable page begins: a read past its end kills the
    test run.
    """
    array = np.ascontiguousarray(array)
    page = mmap.PAGESIZE
    size = -(-max(array.nbytes, 1) // page) * page
    area = mmap.mmap(-1, size + page)
    base = ctypes.addressof(ctypes.c_char.from_buffer(area))
    assert _LIBC.mprotect(ctypes.c_void_p(base + size), ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(area, array.dtype, array.size, size - array.nbytes).reshape(array.shape)
    copy[...] = array
    return copy


def in_turn(jit: Jit, spec: KernelSpec, workers: int, **values: int | float) -> None:
    """Every worker's share, one worker after the other."""
    kernel, block = jit.get(spec), pack(spec.op, **values)
    for worker in range(workers):
        kernel(block, worker, workers)


def spec_of(op: str, isa: str, params: dict[str, int], weight: WeightFormat = "") -> KernelSpec:
    """`KernelSpec.of` for sizes that come as a mapping."""
    return replace(KernelSpec.of(op, isa, weight=weight), params=tuple(sorted(params.items())))


def as_format(values: np.ndarray, format_name: str) -> tuple[np.ndarray, np.ndarray]:
    """`values` as stored in bf16 (bits), fp16 or f32, guarded, and what they then are in f64."""
    if format_name == "bf16":
        return guarded(bf16(values)), from_bf16(bf16(values))
    data = values.astype({"fp16": np.float16, "f32": np.float32}[format_name])
    return guarded(data), data.astype(np.float64)


def floats(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Guarded f32 normal numbers."""
    return guarded(rng.standard_normal(shape, dtype=np.float32))


def filled(shape: tuple[int, ...], dtype: type) -> np.ndarray:
    """A guarded result array full of 77, to show what a kernel leaves alone."""
    return guarded(np.full(shape, 77, dtype))


__all__ = [
    "address",
    "as_format",
    "bf16",
    "filled",
    "floats",
    "from_bf16",
    "guarded",
    "in_turn",
    "spec_of",
]
