"""Memory by the large block: zeroed, huge pages asked for, given back at once by `close`; hides
mmap.

Pages are taken by the kernel when first written, so a block costs what was touched of it. Blocks
that other processes map too are runtime/memory/shared.py's.
"""

from __future__ import annotations

import mmap
from collections.abc import Collection
from typing import Literal

import numpy as np
import numpy.typing as npt

from hmc.errors import CapacityError
from hmc.machine.detect import huge_by_advice
from hmc.runtime.memory.nodes import NotAllowedError, huge, spread

PAGE, HUGE_PAGE = 4 << 10, 2 << 20
LINE = 64

Pages = Literal["reserved", "advised", "normal"]
"""What a block is made of: huge pages out of the pool the administrator reserved; huge pages as far
as the kernel finds them, since it follows advice; or 4 KiB pages."""

_MAP_NORESERVE = 0x4000  # Linux's value; Python 3.11 has no name for it
_FLAGS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE


def aligned(size: int, unit: int = LINE) -> int:
    """`size` rounded up to whole `unit`s."""
    return -(-size // unit) * unit


class Block:
    """`size` bytes of zeroed anonymous memory: `address` (2 MiB aligned) and the same bytes as
    `array` (u8 [size]); `pages` says what they are made of.
    """

    def __init__(self, size: int, purpose: str) -> None:
        """Raises `CapacityError` naming `purpose` when the address space is refused."""
        self._take(size, purpose)
        self.pages: Pages = "advised" if huge_by_advice("enabled") else "normal"
        if self.pages == "advised":
            self._map.madvise(mmap.MADV_HUGEPAGE)

    def _take(self, size: int, purpose: str) -> None:
        """Whole huge pages of address space, and nothing in them yet."""
        self.size, self.purpose = size, purpose
        self.span = aligned(max(size, 1), HUGE_PAGE)
        try:
            self._map = mmap.mmap(-1, self.span + HUGE_PAGE, flags=_FLAGS)
        except (OSError, OverflowError, ValueError) as error:
            raise CapacityError(f"{purpose}: {size / 2**30:.2f} GiB cannot be mapped") from error
        whole = np.frombuffer(self._map, dtype=np.uint8)
        start = -whole.ctypes.data % HUGE_PAGE
        self.array: npt.NDArray[np.uint8] = whole[start : start + size]
        self.address = int(whole.ctypes.data) + start
        self._start = start

    def spread(self, nodes: Collection[int]) -> str:
        """Have its pages, which nobody has touched, come from NUMA nodes by turns where these are
        several; why they come from the nodes of who touches them instead, or "". They are then of 4
        KiB: by huge pages all that a short sequence has could be on one node.
        """
        if len(nodes) < 2:
            return ""
        if self.pages == "advised":
            huge(self.address, self.span, wanted=False)
        try:
            spread(self.address, self.span, nodes)
        except NotAllowedError as why:
            return f"{self.purpose}: by first touch: {why}"
        return ""

    def close(self) -> None:
        """Give the pages back now, even while views of `array` live on (they read zeros from then
        on). A second call does nothing.
        """
        if not self.address:
            return
        self._drop()
        self.array = np.empty(0, dtype=np.uint8)
        self.address = 0

    def _drop(self) -> None:
        self._map.madvise(mmap.MADV_DONTNEED)
