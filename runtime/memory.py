"""Anonymous memory by the large block: zeroed, huge pages asked for, given back at once by `close`;
hides mmap.

Pages are taken by the kernel when first written, so a block costs what was touched of it.
"""

from __future__ import annotations

import mmap

import numpy as np
import numpy.typing as npt

from hmc.errors import CapacityError

HUGE_PAGE = 2 << 20
LINE = 64

_MAP_NORESERVE = 0x4000  # Linux's value; Python 3.11 has no name for it
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def aligned(size: int, unit: int = LINE) -> int:
    """`size` rounded up to whole `unit`s."""
    return -(-size // unit) * unit


class Block:
    """`size` bytes of zeroed anonymous memory: `address` (2 MiB aligned) and the same bytes as
    `array` (u8 [size]).
    """

    def __init__(self, size: int, purpose: str) -> None:
        """Raises `CapacityError` naming `purpose` when the address space is refused."""
        try:
            self._map = mmap.mmap(-1, max(size, 1) + HUGE_PAGE, flags=_FLAGS)
        except (OSError, OverflowError) as error:
            raise CapacityError(f"{purpose}: {size / 2**30:.2f} GiB cannot be mapped") from error
        self._map.madvise(mmap.MADV_HUGEPAGE)
        whole = np.frombuffer(self._map, dtype=np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        self.array: npt.NDArray[np.uint8] = whole[start : start + size]
        self.address = int(whole.ctypes.data) + start
        self.size = size

    def close(self) -> None:
        """Give the pages back now, even while views of `array` live on (they read zeros from then
        on).
        """
        self._map.madvise(mmap.MADV_DONTNEED)
        self.array = np.empty(0, dtype=np.uint8)
        self.address = 0
