"""The data of a checkpoint in memory without a copy: shards mapped read-only, on first use.

A view or an address costs no I/O; the kernel reads pages as they are touched and may drop them
again. Hides files, page alignment and the life of the mappings. Only this module of the package
needs numpy.
"""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.checkpoint.headers import TensorInfo
from hmc.closing import Closing
from hmc.errors import ShardError

STORAGE: dict[str, np.dtype[Any]] = {
    "F8_E4M3": np.dtype(np.uint8),
    "U8": np.dtype(np.uint8),
    "BF16": np.dtype(np.uint16),
    "F16": np.dtype(np.uint16),
    "F32": np.dtype(np.float32),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
}
"""numpy dtype of the same size for each dtype hmc reads; FP8, BF16 and FP16 stay raw bits."""


class MappedShards(Closing):
    """Shards of a directory, mapped read-only when first used.

    `names_and_sizes` lists every shard in order (a shard's number is its place there) with the size
    in bytes it had when its header was read. Safe to use from several threads. After `close`, or
    the end of a `with`, no address may be used any more; a shard whose arrays are still alive stays
    mapped until the last of them is gone.
    """

    def __init__(self, directory: Path | str, names_and_sizes: Iterable[tuple[str, int]]) -> None:
        self._directory = Path(directory)
        self._shards = tuple(names_and_sizes)
        self._bytes: list[npt.NDArray[np.uint8] | None] = [None] * len(self._shards)
        self._maps: list[mmap.mmap | None] = [None] * len(self._shards)
        self._lock = threading.Lock()
        self._closed = False

    def close(self) -> None:
        """Let go of all mappings; a second call does nothing."""
        with self._lock:
            self._closed = True
            self._bytes = [None] * len(self._shards)
            self._maps = [None] * len(self._shards)

    def check(self) -> None:
        """Raise `ShardError` for the first shard that is absent or has changed its size.

        Maps nothing: for a plan that wants to fail before it starts.
        """
        for number in range(len(self._shards)):
            self._check_size(number, self._stat_size(number))

    def address(self, shard: int, offset: int, nbytes: int) -> int:
        """Byte address of `nbytes` at `offset` of a shard; valid until `close`."""
        self._check_range(shard, offset, nbytes)
        return int(self._mapped(shard).ctypes.data) + offset

    def array(
        self, shard: int, offset: int, dtype: npt.DTypeLike, shape: tuple[int, ...]
    ) -> npt.NDArray[Any]:
        """A read-only view of `shape` at `offset` of a shard, of any alignment, not a copy."""
        element = np.dtype(dtype)
        count = 1
        for size in shape:
            count *= size
        self._check_range(shard, offset, count * element.itemsize)
        return np.ndarray(shape, element, self._mapped(shard), offset)

    def tensor(self, info: TensorInfo) -> npt.NDArray[Any]:
        """A read-only view of a tensor, in the `STORAGE` dtype of its own."""
        dtype = STORAGE.get(info.dtype)
        if dtype is None:
            path = self._directory / self._shards[info.shard][0]
            raise ShardError(f"{path}: tensor {info.name} is {info.dtype}, which hmc does not read")
        return self.array(info.shard, info.offset, dtype, info.shape)

    def _mapped(self, shard: int) -> npt.NDArray[np.uint8]:
        data = self._bytes[shard]
        if data is not None:
            return data
        with self._lock:
            if self._closed:
                raise ShardError(f"{self._directory}: the mapped shards are closed already")
            data = self._bytes[shard]
            if data is None:
                mapping = self._map(shard)
                data = np.frombuffer(mapping, np.uint8)
                self._maps[shard], self._bytes[shard] = mapping, data
            return data

    def _map(self, shard: int) -> mmap.mmap:
        name, size = self._shards[shard]
        path = self._directory / name
        try:
            with open(path, "rb") as file:
                if size == 0:
                    raise ShardError(f"{path}: cannot be mapped: the file is empty")
                self._check_size(shard, os.fstat(file.fileno()).st_size)
                return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ)
        except FileNotFoundError:
            raise ShardError(f"{path}: shard is missing") from None
        except OSError as problem:
            raise ShardError(f"{path}: cannot be mapped: {problem.strerror}") from None

    def _stat_size(self, shard: int) -> int:
        path = self._directory / self._shards[shard][0]
        try:
            return path.stat().st_size
        except FileNotFoundError:
            raise ShardError(f"{path}: shard is missing") from None
        except OSError as problem:
            raise ShardError(f"{path}: cannot be read: {problem.strerror}") from None

    def _check_size(self, shard: int, found: int) -> None:
        name, size = self._shards[shard]
        if found != size:
            raise ShardError(
                f"{self._directory / name}: has {found} bytes, had {size} when the plan was made:"
                " the checkpoint changed, compile it again"
            )

    def _check_range(self, shard: int, offset: int, nbytes: int) -> None:
        if not 0 <= shard < len(self._shards):
            raise ShardError(f"{self._directory}: no shard number {shard}")
        name, size = self._shards[shard]
        if offset < 0 or nbytes < 0 or offset + nbytes > size:
            raise ShardError(
                f"{self._directory / name}: bytes {offset} to {offset + nbytes} lie outside its"
                f" {size}"
            )
