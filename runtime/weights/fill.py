"""Filling memory with weights: read from the shards, copied from mapped ones, or random ones that
look like trained ones; hides threads.

Random weights are slices of one pattern per format at varied places, copied at memory speed: what
counts for a benchmark is that values are spread as in a real model (no zeros, NaN or subnormals to
be fast or slow on), that no two experts are equal, and that the same plan gives the same weights.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.errors import ShardError
from hmc.runtime.weights.tensors import Addresses, Key, TensorGroup

Progress = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is (bytes)."""

_PATTERN = 1 << 24  # elements; at odd steps through it, experts start at different places
_STRIDE = 1_234_577
_CHUNK = 64 << 20  # bytes of one copy task
_AHEAD = 256  # tasks that wait
_CODE_STD = 448 / 4.0  # a block of 16384 Gaussian values has its largest near 4 standard deviations
_INT4_STD = 4.6  # of the uniform codes -8..7


def copy_spans(
    groups: Sequence[TensorGroup],
    source: Mapping[Key, Addresses],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
) -> None:
    """Copy each tensor from its address in `source` to that in `places`; widened groups become f32
    on the way.
    """

    def tasks() -> Iterable[tuple[Callable[[], None], int]]:
        for group in groups:
            for start, target in zip(source[group.key], places[group.key], strict=True):
                if group.widen:
                    yield partial(_widen, int(start), int(target), group.nbytes), group.nbytes
                    continue
                for at in range(0, group.nbytes, _CHUNK):
                    size = min(_CHUNK, group.nbytes - at)
                    yield partial(_copy, int(start) + at, int(target) + at, size), size

    total = sum(len(group.shards) * group.nbytes for group in groups)
    _run(tasks(), total, "loading weights", progress)


def read_spans(
    groups: Sequence[TensorGroup],
    shards: Sequence[Path],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
) -> None:
    """Read each tensor from its shard to its address in `places`; widened groups become f32 on the
    way. `ShardError` when a shard cannot be read or ends too early.

    A failing disk is an error here instead of the signal that copying from mapped pages ends in.
    Neither is always the faster one: into private memory reading was up to half as fast again (no
    page of the shard has to be mapped), into a warm memory file once a fifth slower.
    """
    with ExitStack() as stack:
        files: list[_File] = []
        for path in shards:
            files.append(_File.open(path))
            stack.callback(files[-1].close)

        def tasks() -> Iterable[tuple[Callable[[], None], int]]:
            for group in groups:
                spans = zip(group.shards, group.offsets, places[group.key], strict=True)
                for shard, start, target in spans:
                    file, offset, to = files[int(shard)], int(start), int(target)
                    if group.widen:
                        yield partial(_read_wide, file, offset, to, group.nbytes), group.nbytes
                        continue
                    for at in range(0, group.nbytes, _CHUNK):
                        size = min(_CHUNK, group.nbytes - at)
                        yield partial(file.read, offset + at, _bytes(to + at, size)), size

        total = sum(len(group.shards) * group.nbytes for group in groups)
        _run(tasks(), total, "loading weights", progress)


def fill_dummy(
    groups: Sequence[TensorGroup],
    places: Mapping[Key, Addresses],
    progress: Progress | None,
) -> None:
    """Write random weights: fp8 codes of a Gaussian scaled to its block's largest, others with std
    1/sqrt(fan_in).
    """
    patterns = _Patterns()

    def tasks() -> Iterable[tuple[Callable[[], None], int]]:
        number = 0
        for group in groups:
            pattern = patterns.of(group)
            for target in places[group.key]:
                number += 1
                size = group.home_bytes
                yield partial(_tile, pattern, number * _STRIDE, int(target), size), size

    total = sum(len(group.shards) * group.home_bytes for group in groups)
    _run(tasks(), total, "making dummy weights", progress)


class _File:
    """A shard that threads read from."""

    def __init__(self, path: Path, descriptor: int) -> None:
        self._path, self._descriptor = path, descriptor

    @classmethod
    def open(cls, path: Path) -> _File:
        try:
            return cls(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
        except FileNotFoundError:
            raise ShardError(f"{path}: shard is missing") from None
        except OSError as error:
            raise ShardError(f"{path}: cannot be read: {error.strerror}") from error

    def read(self, offset: int, into: npt.NDArray[np.uint8]) -> None:
        """Fill `into` with what begins at `offset`."""
        done = 0
        while done < len(into):
            try:
                count = os.preadv(self._descriptor, [into[done:].data], offset + done)
            except OSError as error:
                raise ShardError(f"{self._path}: cannot be read: {error.strerror}") from error
            if count == 0:
                raise ShardError(
                    f"{self._path}: ends at byte {offset + done}, within a tensor: the checkpoint"
                    " changed while it was read"
                )
            done += count

    def close(self) -> None:
        os.close(self._descriptor)


class _Patterns:
    """Values to cut tensors from, as bytes, one array per format and scale."""

    def __init__(self) -> None:
        self._gauss = np.random.default_rng(0).standard_normal(_PATTERN, np.float32)
        self._known: dict[tuple[str, int], npt.NDArray[Any]] = {}

    def of(self, group: TensorGroup) -> npt.NDArray[Any]:
        """Elements of `group`'s format as unsigned integers of their size."""
        key = (group.format, group.fan_in)
        if key not in self._known:
            self._known[key] = self._make(group)
        return self._known[key]

    def _make(self, group: TensorGroup) -> npt.NDArray[Any]:
        std = (group.fan_in or 1) ** -0.5
        if group.format == "fp8":
            return _fp8_codes(self._gauss * np.float32(_CODE_STD))
        if group.format == "int4":
            return self._gauss.view(np.uint8)[0::4]  # the lowest mantissa bits: uniform
        if group.format == "fp8 scale":
            return np.full(4096, std / _CODE_STD, np.float32).view(np.uint32)
        if group.format == "int4 scale":
            return _bf16_bits(np.full(4096, std / _INT4_STD, np.float32))
        # Vectors are gains of norms or biases: near 1 is harmless for both.
        values = self._gauss * np.float32(std) if group.fan_in else 1 + 0.05 * self._gauss
        if group.format == "f32":
            return values.view(np.uint32)
        if group.format == "bf16":
            return _bf16_bits(values)
        return values.astype(np.float16).view(np.uint16)


def _bf16_bits(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """f32 values rounded to bf16, to the nearest even."""
    bits = values.view(np.uint32)
    return ((bits + (0x7FFF + (bits >> 16 & 1))) >> 16).astype(np.uint16)


def _fp8_codes(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint8]:
    """f32 values as E4M3 codes, cut off at 448: subnormals are multiples of 2^-9."""
    sizes = np.minimum(np.abs(values), np.float32(448))
    bits = sizes.view(np.uint32)
    # To the nearest even of three bits behind the first; the exponent 1 is 121 in f32.
    normal = ((bits + (0x7FFFF + (bits >> 20 & 1))) >> 20) - (120 << 3)
    codes = np.where(sizes < 2**-6, np.rint(sizes * 512), normal).astype(np.uint8)
    return np.where(np.signbit(values), codes | np.uint8(0x80), codes)


def _run(
    tasks: Iterable[tuple[Callable[[], None], int]],
    total: int,
    what: str,
    progress: Progress | None,
) -> None:
    done = 0
    pending: deque[tuple[Future[None], int]] = deque()

    def finish_first() -> int:
        future, size = pending.popleft()
        future.result()
        if progress is not None:
            progress(what, done + size, total)
        return done + size

    with ThreadPoolExecutor(len(os.sched_getaffinity(0)), "hmc-fill") as pool:
        for task, size in tasks:
            pending.append((pool.submit(task), size))
            if len(pending) >= _AHEAD:
                done = finish_first()
        while pending:
            done = finish_first()


def _bytes(address: int, size: int) -> npt.NDArray[np.uint8]:
    return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))


def _copy(start: int, target: int, size: int) -> None:
    np.copyto(_bytes(target, size), _bytes(start, size))


def _read_wide(file: _File, offset: int, target: int, size: int) -> None:
    narrow = np.empty(size, np.uint8)
    file.read(offset, narrow)
    _widen(narrow.ctypes.data, target, size)


def _widen(start: int, target: int, size: int) -> None:
    narrow = _bytes(start, size).view(np.uint16)
    np.left_shift(narrow, 16, out=_bytes(target, 2 * size).view(np.uint32), dtype=np.uint32)


def _tile(pattern: npt.NDArray[Any], start: int, target: int, size: int) -> None:
    """Fill `size` bytes at `target` with the pattern from element `start` on, round and round."""
    out = _bytes(target, size).view(pattern.dtype)
    at, place = 0, start % len(pattern)
    while at < len(out):
        count = min(len(out) - at, len(pattern) - place)
        out[at : at + count] = pattern[place : place + count]
        at, place = at + count, 0
