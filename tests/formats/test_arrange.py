"""Planes that checkpoints lay out otherwise than kernels read them: every bit is where its format's
description puts it, written here element by element.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hmc.errors import TensorError
from hmc.formats import FORMATS, Format, forms
from hmc.formats.arrange import all_arranged, arranged
from hmc.formats.base import Form
from hmc.formats.decode import NUMPY, decode

N, K, GROUP = 24, 64, 32
Made = tuple[np.ndarray[Any, Any], ...]
RNG = np.random.default_rng(0)


def in_memory(row: Format, stored: list[Any], dtypes: list[str]) -> Any:
    """The weight f32 [N, K] of tensors as a checkpoint holds them."""
    found: list[Form] = list(forms(row, (N, K), GROUP if row.grouped else 0, dtypes))
    planes = all_arranged(zip(found, map(np.asarray, stored), strict=True))
    for form, plane in zip(found, planes, strict=True):
        assert plane.shape == form.shape
    kept = [form.plane.layout.makes or form.plane.means(form.dtype) for form in found]
    return decode(row, planes, kept, (N, K), GROUP if row.grouped else 0)


def by_inputs(bits: int, zeros_less: int, order: tuple[int, ...]) -> tuple[Any, Any, Any, Any]:
    """Codes [K, N], zeros [G, N], and words of zeros along the outputs in an order."""
    each = 32 // bits
    codes = RNG.integers(0, 2**bits, (K, N))
    zeros = RNG.integers(zeros_less, 2**bits, (K // GROUP, N))
    words = np.zeros((K // GROUP, N // each), np.uint32)
    for g in range(K // GROUP):
        for n in range(N):
            nibble = order.index(n % each) if order else n % each
            word = np.uint32(int(zeros[g, n] - zeros_less) << bits * nibble)
            words[g, n // each] |= word
    return codes, zeros, words, RNG.uniform(0.5, 2, (K // GROUP, N)).astype(np.float16)


def expected(codes: Any, zeros: Any, scales: Any, group_of: Any) -> Any:
    return ((codes - zeros[group_of]) * scales[group_of].astype(np.float32)).T


def test_awq() -> None:
    order = (0, 2, 4, 6, 1, 3, 5, 7)
    codes, zeros, zero_words, scales = by_inputs(4, 0, order)
    words = np.zeros((K, N // 8), np.uint32)
    for k in range(K):
        for n in range(N):
            words[k, n // 8] |= np.uint32(int(codes[k, n]) << 4 * order.index(n % 8))
    found = in_memory(FORMATS["awq"], [words, scales, zero_words], ["I32", "F16", "I32"])
    np.testing.assert_array_equal(found, expected(codes, zeros, scales, np.arange(K) // GROUP))


@pytest.mark.parametrize(
    ("name", "bits", "less"),
    [("gptq", 4, 1), ("gptq2", 4, 0), ("gptq8", 8, 1), ("gptq-order", 4, 1),
     ("gptq8-order", 8, 1)],
)  # fmt: skip
def test_gptq(name: str, bits: int, less: int) -> None:
    each = 32 // bits
    codes, zeros, zero_words, scales = by_inputs(bits, less, ())
    words = np.zeros((K // each, N), np.uint32)
    for k in range(K):
        for n in range(N):
            words[k // each, n] |= np.uint32(int(codes[k, n]) << bits * (k % each))
    stored, dtypes = [words, scales, zero_words], ["I32", "F16", "I32"]
    order = np.arange(K) // GROUP
    if name.endswith("order"):
        order = RNG.permutation(order).astype(np.uint32)
        stored.append(order)
        dtypes.append("I32")
    found = in_memory(FORMATS[name], stored, dtypes)
    np.testing.assert_array_equal(found, expected(codes, zeros, scales, order))


@pytest.mark.parametrize("changed", [0, 1, K // GROUP, 2**32 - 1])
def test_a_damaged_order_is_refused(changed: int) -> None:
    dtypes = ["I32", "F16", "I32", "I32"]
    *_, form = forms(FORMATS["gptq-order"], (N, K), GROUP, dtypes)
    order = (np.arange(K) // GROUP).astype(np.uint32)
    arranged(form, order)
    order[0 if changed else -1] = changed
    with pytest.raises(TensorError, match="columns must be of 2 groups, 32 of each"):
        arranged(form, order)


def test_zeros_of_compressed_tensors() -> None:
    codes, zeros = RNG.integers(0, 16, (N, K)), RNG.integers(0, 16, (N, K // GROUP))
    words = np.zeros((N, K // 8), np.uint32)
    zero_words = np.zeros((N // 8, K // GROUP), np.uint32)
    for n in range(N):
        for k in range(K):
            words[n, k // 8] |= np.uint32(int(codes[n, k]) << 4 * (k % 8))
        for g in range(K // GROUP):
            zero_words[n // 8, g] |= np.uint32(int(zeros[n, g]) << 4 * (n % 8))
    scales = RNG.uniform(0.5, 2, (N, K // GROUP)).astype(np.float32)
    found = in_memory(FORMATS["int4-zero"], [words, scales, zero_words], ["I32", "F32", "I32"])
    group_of = np.arange(K) // GROUP
    wanted = (codes - zeros[:, group_of]).astype(np.float32) * scales[:, group_of]
    np.testing.assert_array_equal(found, wanted)


def test_nvfp4_is_divided() -> None:
    codes = RNG.integers(0, 256, (N, K // 2)).astype(np.uint8)
    scales = RNG.integers(0x20, 0x60, (N, K // 16)).astype(np.uint8)
    row, times = FORMATS["nvfp4"], FORMATS["nvfp4-times"]
    dtypes = ["U8", "F8_E4M3", "F32"]
    one = in_memory(row, [codes, scales, np.float32([4.0])], dtypes)
    other = in_memory(times, [codes, scales, np.float32([[0.25]])], dtypes)
    np.testing.assert_array_equal(one, other)


def test_every_dtype_in_memory_is_known_to_numpy() -> None:
    for row in FORMATS.values():
        for plane in row.planes:
            for dtype in plane.dtypes:
                assert plane.in_memory(dtype) in NUMPY
