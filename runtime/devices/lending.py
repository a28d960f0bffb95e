"""Device memory that several processes use: an allocation of one, opened by others.

On GPUs through CUDA's interprocess handles, as torch.multiprocessing does; where the CPU plays
them, through the memory file that the allocation is in. The lender keeps it, and must outlive its
use.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch

from hmc.errors import ExecutionError
from hmc.runtime.memory.shared import SharedBlock


@dataclass(frozen=True)
class Lent:
    """What another process needs to open `nbytes` bytes from `offset` of an allocation: `file`
    (path and bytes of a memory file) or CUDA's `handle`."""

    offset: int
    nbytes: int
    file: tuple[str, int] | None = None
    handle: tuple[Any, ...] = ()


def lend(tensor: torch.Tensor, block: SharedBlock | None) -> Lent:
    """A u8 tensor of this process; `block` is the memory file that it is in, if it is on the CPU.

    What was written to it before is there for the borrower: this waits for the device."""
    if tensor.is_cuda:
        torch.cuda.synchronize(tensor.device)
        storage: Any = tensor.untyped_storage()
        handle = tuple(storage._share_cuda_())
        return Lent(int(tensor.storage_offset()), len(tensor), handle=handle)
    if block is None:
        raise ExecutionError("device memory can be lent only where it is made to be shared")
    file = f"/proc/{os.getpid()}/fd/{block.descriptor}"
    return Lent(tensor.data_ptr() - block.address, len(tensor), file=(file, block.size))


def borrow(lent: Lent, device: torch.device, purpose: str) -> tuple[torch.Tensor, Any]:
    """The lender's bytes, u8 [nbytes], and what keeps them open."""
    if lent.file is None:
        storage = torch.UntypedStorage._new_shared_cuda(*lent.handle)
        whole = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        return whole[lent.offset : lent.offset + lent.nbytes], storage
    path, size = lent.file
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ExecutionError(f"{purpose}: {path} of rank 0: {error.strerror}") from error
    try:
        block = SharedBlock.attach(descriptor, size, purpose, write=True)
    finally:
        os.close(descriptor)
    return torch.from_numpy(block.array)[lent.offset : lent.offset + lent.nbytes], block
