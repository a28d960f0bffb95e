"""One device's memory, the same for every backend: it says where bytes come from.

Hides alignment, and the counting of what is in use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from hmc.errors import CapacityError, ExecutionError
from hmc.runtime.devices.lending import Lent, borrow, lend
from hmc.runtime.memory.shared import SharedBlock

ALIGNMENT = 256
"""Bytes to which every allocation is aligned and rounded up."""


class Gpu:
    """One GPU of a backend, or what stands for it. Every byte handed out counts as `used` until it
    is freed."""

    def __init__(
        self,
        name: str,
        torch_device: torch.device,
        room: Callable[[Gpu], int],
        *,
        shared: bool = False,
    ) -> None:
        """`room(gpu)` says how many bytes can still be had; with `shared`, memory of the CPU is
        made so that it can be lent to other processes (that of GPUs always can)."""
        self.name = name
        self.torch_device = torch_device
        self._room = room
        self._shared = shared
        self._held: dict[int, tuple[torch.Tensor, int]] = {}
        self._blocks: dict[int, SharedBlock] = {}
        self._borrowed: dict[int, Any] = {}
        self._closed = False
        self.used = 0

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Uninitialised memory, u8 [nbytes]; `CapacityError` where there is not so much."""
        size = -(-max(nbytes, 1) // ALIGNMENT) * ALIGNMENT
        room = self._room(self)
        refused = CapacityError(
            f"{self.name} cannot hold {purpose}: {nbytes:,} bytes asked, {max(room, 0):,} free;"
            " compile for less (--vram, --max-context)"
        )
        if size > room:
            raise refused
        block = None
        try:
            if self._shared and self.torch_device.type == "cpu":
                block = SharedBlock(size + ALIGNMENT, purpose)
                whole = torch.from_numpy(block.array)
            else:
                whole = torch.empty(size + ALIGNMENT, dtype=torch.uint8, device=self.torch_device)
        except torch.OutOfMemoryError as error:
            raise refused from error
        except RuntimeError as error:  # how the CPU's allocator says it
            if self.torch_device.type != "cpu":
                raise
            raise refused from error
        start = -whole.data_ptr() % ALIGNMENT
        key = whole.untyped_storage().data_ptr()
        self._held[key] = (whole, size)
        if block is not None:
            self._blocks[key] = block
        self.used += size
        return whole[start : start + nbytes]

    def free(self, tensor: torch.Tensor) -> None:
        """Give an allocation back; `ExecutionError` for a tensor that is none. After `close` there
        is nothing left to give back."""
        if self._closed:
            return
        key = tensor.untyped_storage().data_ptr()
        borrowed = self._borrowed.pop(key, None)
        if borrowed is not None:
            _let_go(borrowed)
            return
        held = self._held.pop(key, None)
        if key in self._blocks:
            self._blocks.pop(key).close()
        if held is None:
            raise ExecutionError(f"{self.name}: a tensor is freed that was not allocated here")
        self.used -= held[1]

    def lend(self, tensor: torch.Tensor) -> Lent:
        """How another process opens an allocation, or a part of one."""
        return lend(tensor, self._blocks.get(tensor.untyped_storage().data_ptr()))

    def borrow(self, lent: Lent, purpose: str) -> torch.Tensor:
        """Memory that another process has allocated and counted; `free` lets go of it."""
        found, kept = borrow(lent, self.torch_device, purpose)
        self._borrowed[found.untyped_storage().data_ptr()] = kept
        return found

    def close(self) -> None:
        """Free all of its memory."""
        self._closed = True
        self._held.clear()
        for each in (*self._blocks.values(), *self._borrowed.values()):
            _let_go(each)
        self._blocks.clear()
        self._borrowed.clear()
        self.used = 0


def _let_go(kept: object) -> None:
    """Give a memory file back now; what CUDA keeps goes with its last tensor."""
    if isinstance(kept, SharedBlock):
        kept.close()
