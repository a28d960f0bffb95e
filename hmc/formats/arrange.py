"""Planes as checkpoints lay them out -> as kernels read them: bits move, values stay. In numpy; by
the names of `layouts.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import TensorError
from hmc.formats.base import Form
from hmc.formats.layouts import (
    AWQ,
    AWQ_ZEROS,
    BY_INPUT,
    GPTQ2_ZEROS,
    GPTQ_ZEROS,
    PACKED_ZEROS,
    RECIPROCAL,
    SIGNED_ZEROS,
    TRANSPOSED,
)

Array = npt.NDArray[Any]
Words = npt.NDArray[np.uint32]

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""Which of eight outputs nibble i of AWQ's words holds."""


def arranged(form: Form, stored: Array, order: Array | None = None) -> Array:
    """A plane of `form` as kernels read it, still in its stored dtype where that is widened
    afterwards; `stored` has the elements of `form.stored`, as numpy holds them (`decode.NUMPY`).
    Planes whose layout is `ordered` take the weight's `order`, arranged already. `TensorError` for
    an order whose groups are not all of as many columns.
    """
    layout = form.plane.layout
    if not layout.name:
        return stored.reshape(form.shape)
    stored = stored.reshape(form.stored)
    if form.plane.kind == "order":
        found = _order(stored, form.group)
    elif layout.ordered:
        assert order is not None
        found = _by_group(stored, form.shape, order.reshape(-1), form.plane.bits)
    else:
        found = ARRANGE[layout.name](stored, form.shape)
    return np.ascontiguousarray(found).reshape(form.shape)


def all_arranged(planes: Iterable[tuple[Form, Array]]) -> list[Array]:
    """`arranged` of each plane of a weight."""
    given = list(planes)
    orders = [arranged(*each) for each in given if each[0].plane.kind == "order"]
    order = orders[0] if orders else None
    return [arranged(form, stored, order) for form, stored in given]


def _unpacked(words: Words, bits: int, order: tuple[int, ...] = ()) -> Words:
    """[k, n] of [k, n * bits / 32]: the codes in words, the lowest first, or that of place
    `order[i]`.
    """
    each = 32 // bits
    shifts = np.arange(0, 32, bits, dtype=np.uint32)
    codes = words[..., None] >> shifts & np.uint32(2**bits - 1)
    if order:
        codes = codes[..., np.argsort(order)]
    return codes.reshape(len(words), words.shape[1] * each)


def _bf16(codes: Array) -> Array:
    """Whole numbers from -256 to 256 as bf16."""
    found: Array = (codes.astype(np.float32).view(np.uint32) >> 16).astype(np.uint16)
    return found


def _awq(stored: Words, shape: tuple[int, ...]) -> Array:
    """Some outputs at once, so that codes apart are in a cache."""
    words, step = stored.shape[1], 8
    found = np.empty((8 * words, 4 * shape[1]), np.uint8)
    for first in range(0, words, step):
        part = np.zeros((8 * shape[1], min(step, words - first)), np.uint32)
        part[: len(stored)] = stored[:, first : first + step]
        each = part.view(np.uint8).reshape(*part.shape, 4)
        for place, output in enumerate(AWQ_ORDER):
            codes = each[..., place // 2] >> 4 * (place % 2) & 15
            last = 8 * (first + step)
            found[8 * first + output : last : 8] = (codes[::2] | codes[1::2] << 4).T
    return found[: shape[0]].view(np.uint32)


def _order(stored: Words, group: int) -> Words:
    """Columns group after group, of the group of each; those of a group as they lie."""
    groups = stored.reshape(-1)
    most = len(groups) // group
    sizes = np.bincount(groups, minlength=most) if groups.max() < most else None
    if sizes is None or (sizes != group).any():
        raise TensorError(f"columns must be of {most} groups, {group} of each: the file is damaged")
    return np.argsort(groups, kind="stable").astype(np.uint32)


def _by_group(stored: Words, shape: tuple[int, ...], order: Array, bits: int) -> Words:
    """Words of codes along the inputs, these in an order; some outputs at once, so that codes apart
    are in a cache.
    """
    step, inputs = 64, stored.shape[0] * 32 // bits
    found = np.empty((shape[0], shape[1] * 4), np.uint8)
    for first in range(0, shape[0], step):
        part = np.ascontiguousarray(stored[:, first : first + step])
        each: Array = (
            part.view(np.uint8).reshape(*part.shape, 4).swapaxes(1, 2).reshape(-1, part.shape[1])
        )
        if bits == 4:
            each = np.stack((each & 15, each >> 4), 1).reshape(inputs, -1)
        codes = np.zeros_like(each)
        codes[: len(order)] = each[order]
        if bits == 4:
            codes = codes[::2] | codes[1::2] << 4
        found[first : first + step] = codes.T
    return found.view(np.uint32)


def _zeros(bits: int, order: tuple[int, ...] = (), less: int = 0) -> Arrange:
    def arrange(stored: Words, shape: tuple[int, ...]) -> Array:
        return _bf16(_unpacked(stored, bits, order)[:, : shape[0]].T + np.uint32(less))

    return arrange


def _packed_zeros(bits: int) -> Arrange:
    def arrange(stored: Words, shape: tuple[int, ...]) -> Array:
        return _bf16(_unpacked(np.ascontiguousarray(stored.T), bits)[:, : shape[0]].T)

    return arrange


def _signed_zeros(stored: Array, shape: tuple[int, ...]) -> Array:
    return _bf16(stored.view(np.int8))


def _transposed(stored: Array, shape: tuple[int, ...]) -> Array:
    return stored.T


def _reciprocal(stored: Array, shape: tuple[int, ...]) -> Array:
    return np.float32(1.0) / stored.view(np.float32)


Arrange = Callable[[Any, tuple[int, ...]], Array]

ARRANGE: Mapping[str, Arrange] = {
    TRANSPOSED.name: _transposed,
    AWQ.name: _awq,
    AWQ_ZEROS.name: _zeros(4, AWQ_ORDER),
    SIGNED_ZEROS.name: _signed_zeros,
    RECIPROCAL.name: _reciprocal,
    **{layout.name: _transposed for layout in BY_INPUT.values()},
    **{layout.name: _packed_zeros(bits) for bits, layout in PACKED_ZEROS.items()},
    **{layout.name: _zeros(bits, less=1) for bits, layout in GPTQ_ZEROS.items()},
    **{layout.name: _zeros(bits) for bits, layout in GPTQ2_ZEROS.items()},
}
"""By the name of a layout: what makes an array of the memory's shape of a stored one."""
