"""Stored weights in every format with their float64 values, and calls of the prefill kernels."""

from __future__ import annotations

import ctypes
import mmap
import threading
from dataclasses import dataclass

import numpy as np
import pytest
from emulated import EMULATING

from hmc.codegen.arguments import pack
from hmc.codegen.formats.whole import LARGEST
from hmc.codegen.isa import TIERS, cpu_flags
from hmc.codegen.jit import Jit
from hmc.codegen.panel.tiling import CHUNK, Form
from hmc.codegen.spec import KernelSpec, WeightFormat
from hmc.formats import format_of

_PROT_NONE = 0  # of sys/mman.h
FORMATS: list[WeightFormat] = ["fp8", "bf16", "fp16", "f32", "int4"]


def need(isa: str) -> None:
    """Skip the test where this CPU lacks the tier and it is not emulated either."""
    if not (EMULATING or TIERS[isa].flags <= cpu_flags()):
        pytest.skip(f"this CPU lacks {isa}; HMC_TEST_EMULATE=1 runs its kernels all the same")


def in_whole_numbers(x: np.ndarray, chunk: int, largest: float = LARGEST) -> np.ndarray:
    """Activations x [T, K] rounded to multiples of a chunk's largest / `largest`, as whole.py does
    it; checks how far that takes them.
    """
    seen = x.copy()
    for start in range(0, x.shape[1], chunk):
        part = x[:, start : start + chunk].astype(np.float32)
        most = np.maximum(np.abs(part).max(axis=1, keepdims=True), np.float32(1e-30))
        scale = (np.float32(largest) / most).astype(np.float64)
        magic = 1.5 * 2.0**23  # float64 holds the product and the sum: one rounding, as a fused one
        whole = (part * scale + magic).astype(np.float32).astype(np.float64) - magic
        seen[:, start : start + chunk] = whole * (most / np.float32(largest))
        assert (np.abs(seen[:, start : start + chunk] - part) <= 0.503 / largest * most).all()
    return seen


def as_packed(spec: KernelSpec, x: np.ndarray) -> np.ndarray:
    """Activations x [T, K] as a many-token kernel multiplies them."""
    return in_whole_numbers(x, CHUNK) if Form.of(spec).micro.token_factors else x


def bf16(values: np.ndarray) -> np.ndarray:
    """f32 to bf16 bits (u16), to nearest even."""
    bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """bf16 bits to f64."""
    return (bits.astype(np.uint32) << 16).view(np.float32).astype(np.float64)


def e4m3(codes: np.ndarray) -> np.ndarray:
    """E4M3FN codes to f64."""
    exponent, mantissa = (codes >> 3) & 15, (codes & 7).astype(np.float64)
    value = np.where(exponent > 0, (8 + mantissa) * 2.0 ** (exponent - 10.0), mantissa * 2.0**-9)
    value = np.where((codes & 127) == 127, np.nan, value)
    return np.where(codes & 128, -value, value)


@dataclass
class Stored:
    """A weight matrix as stored (`data`, `scale`) and as f64 [n, k] (`values`)."""

    data: np.ndarray
    scale: np.ndarray
    values: np.ndarray
    group: int = 0


def groups(weight: str, group: int, scale_dtype: int = 0) -> dict[str, int]:
    """What a spec says of the scales of a format that leaves them open."""
    return {"group": group, "scale_dtype": scale_dtype} if format_of(weight).grouped else {}


def stored(
    rng: np.random.Generator,
    weight: WeightFormat,
    n: int,
    k: int,
    group: int = 128,
    scale_dtype: int = 0,
) -> Stored:
    """A random matrix; its last byte ends the buffer."""
    scale: np.ndarray
    nothing = np.zeros(1, np.float32)
    if weight == "fp8":
        codes = rng.integers(0, 256, (n, k), dtype=np.uint8)
        codes[(codes & 127) == 127] = 0x31
        scale = rng.uniform(0.5, 2.0, (-(-n // 128), -(-k // 128))).astype(np.float32)
        spread = np.repeat(np.repeat(scale, 128, 0), 128, 1)[:n, :k]
        return Stored(codes, scale, e4m3(codes) * spread.astype(np.float64))
    if weight == "int4":
        nibbles = rng.integers(0, 16, (n, -(-k // 8) * 8)).astype(np.uint32)
        shifts = np.arange(8, dtype=np.uint32) * 4
        words = np.bitwise_or.reduce(nibbles.reshape(n, -1, 8) << shifts, axis=2)
        scale = bf16(rng.uniform(0.5, 2.0, (n, -(-k // group))))
        spread = np.repeat(from_bf16(scale), group, 1)[:, :k]
        if scale_dtype == 1:
            scale = from_bf16(scale).astype(np.float32)
        return Stored(words, scale, (nibbles[:, :k].astype(np.float64) - 8) * spread, group)
    values = rng.standard_normal((n, k)).astype(np.float32)
    if weight == "bf16":
        return Stored(bf16(values), nothing, from_bf16(bf16(values)))
    data = values.astype({"fp16": np.float16, "f32": np.float32}[weight])
    return Stored(data, nothing, data.astype(np.float64))


def activations(rng: np.random.Generator, tokens: int, k: int, stride: int) -> np.ndarray:
    """bf16 bits [tokens, stride]; columns past `k` are NaN and must not be read."""
    x = np.full((tokens, stride), 0x7FC0, np.uint16)
    x[:, :k] = bf16(rng.standard_normal((tokens, k)))
    return x


def address(array: np.ndarray | None) -> int:
    """Byte address, 0 for None."""
    return 0 if array is None else array.ctypes.data


def before_a_hole(array: np.ndarray) -> np.ndarray:
    """A copy whose last byte is followed by a page that faults when it is touched."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    # The mapping goes when the last array over it does.
    whole = np.frombuffer(mmap.mmap(-1, size + page), np.uint8)
    hole = ctypes.c_void_p(whole.ctypes.data + size)
    assert ctypes.CDLL(None).mprotect(hole, ctypes.c_size_t(page), _PROT_NONE) == 0
    copy = whole[size - array.nbytes : size].view(array.dtype).reshape(array.shape)
    copy[...] = array
    return copy


def run(jit: Jit, spec: KernelSpec, workers: int, **values: int) -> None:
    """All workers' shares, in threads of their own."""
    kernel, block = jit.get(spec), pack(spec.op, **values)
    threads = [
        threading.Thread(target=kernel, args=(block, worker, workers)) for worker in range(workers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
