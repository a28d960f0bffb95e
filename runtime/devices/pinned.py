"""Pins ranges of host memory, so that GPUs copy from them at the full rate of the bus.

A range stays where it is: weights in an arena or in mapped shards need no second copy.
"""

from __future__ import annotations

import resource
from typing import Any

import torch

from hmc.errors import ExecutionError, MachineError

_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every GPU of the process
_READ_ONLY = 8  # cudaHostRegisterReadOnly: the process cannot write it, the GPUs will not


def pin(address: int, nbytes: int, *, read_only: bool = False) -> None:
    """Pin [address, address + nbytes) for all GPUs; `unpin` before the memory is unmapped.
    `read_only` is for weights that the process cannot write, such as mapped shards.

    Raises `MachineError` where the system refuses, with the limit on locked memory where that is
    too small for the range. (Most drivers do not count pinned memory against that limit, so a
    small limit alone refuses nothing.)
    """
    if not torch.cuda.is_available():
        raise MachineError("memory can be pinned only where PyTorch finds a GPU: see `nvidia-smi`")
    flags = _PORTABLE | (_READ_ONLY if read_only else 0)
    status = int(_cudart().cudaHostRegister(address, nbytes, flags))
    if status == 0:
        return
    if read_only:
        raise MachineError(
            f"{nbytes:,} bytes of weights that this process only reads cannot be pinned for the"
            f" GPUs (CUDA error {status}): read them into its own memory with --home arena"
        )
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if limit != resource.RLIM_INFINITY and limit < nbytes:
        raise MachineError(
            f"{nbytes:,} bytes cannot be pinned (CUDA error {status}): the limit on locked memory"
            f" is {limit:,} bytes; raise it with `ulimit -l unlimited` or in"
            " /etc/security/limits.conf (memlock)"
        )
    raise MachineError(f"{nbytes:,} bytes cannot be pinned (CUDA error {status}): free host memory")


def unpin(address: int) -> None:
    """Undo `pin` of the range that starts at `address`."""
    status = int(_cudart().cudaHostUnregister(address))
    if status != 0:
        raise ExecutionError(f"pinned memory at {address:#x} cannot be released: error {status}")


def pinned(nbytes: int, purpose: str) -> torch.Tensor:
    """A pinned host buffer, u8 [nbytes]; `MachineError` where it cannot be had."""
    try:
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        raise MachineError(
            f"{nbytes:,} bytes of pinned host memory for {purpose} cannot be had: {error}"
        ) from error


def _cudart() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
