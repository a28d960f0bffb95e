"""The data of a checkpoint in memory without a copy: shards mapped read-only.

An address costs no I/O; the kernel reads pages as they are touched and may drop them again. Only
this module of the package needs numpy.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hmc.checkpoint.headers import ShardInfo
from hmc.checkpoint.location import shard_paths
from hmc.closing import Closing
from hmc.errors import ShardError


class MappedShards(Closing):
    """Shards of a checkpoint, mapped read-only: `addresses` of their first bytes, in order.

    Raises `ShardError` for a shard that is absent, cannot be mapped or has another size than when
    its header was read. After `close`, or the end of a `with`, no address may be used any more.
    """

    def __init__(self, location: Path | str, shards: Sequence[ShardInfo]) -> None:
        paths = shard_paths(Path(location), [shard.name for shard in shards])
        pairs = zip(paths, shards, strict=True)
        self._bytes = [_mapped(path, shard.size) for path, shard in pairs]
        self.addresses = [int(each.ctypes.data) for each in self._bytes]

    def close(self) -> None:
        """Let go of all mappings; a second call does nothing."""
        self._bytes = []


def _mapped(path: Path, size: int) -> npt.NDArray[np.uint8]:
    """All bytes of a file of `size` bytes; the mapping ends with the array."""
    try:
        with open(path, "rb") as file:
            if size == 0:
                raise ShardError(f"{path}: cannot be mapped: the file is empty")
            found = os.fstat(file.fileno()).st_size
            if found != size:
                raise ShardError(
                    f"{path}: has {found} bytes, had {size} when the plan was made: the checkpoint"
                    " changed, compile it again"
                )
            return np.frombuffer(mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ), np.uint8)
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing") from None
    except OSError as problem:
        raise ShardError(f"{path}: cannot be mapped: {problem.strerror}") from None
