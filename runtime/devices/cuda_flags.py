"""Streams of GPUs that write and wait for words of pinned host memory, by the CUDA driver's stream
memory operations; hides the driver's library and its calls.

These are the second versions of the calls, which every driver since CUDA 11.7 has. The attribute
CAN_USE_STREAM_MEM_OPS speaks of the first versions, which administrators had to allow, so it is not
asked: `probe` tries a write and a wait instead.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from typing import Any

import torch

from hmc.errors import MachineError
from hmc.runtime.devices.flags import Flags

_GREATER_OR_EQUAL = 0  # CU_STREAM_WAIT_VALUE_GEQ: (int32)(word - value) >= 0
_AFTER_ALL_WRITES = 0  # CU_STREAM_WRITE_VALUE_DEFAULT: what was done before is visible before
_LIBRARY = "libcuda.so.1"


class StreamMemory:
    """The driver's calls. Each takes a stream and the number of its GPU."""

    def __init__(self) -> None:
        """Raises `MachineError` where the driver has no such calls."""
        try:
            library = ctypes.CDLL(_LIBRARY)
        except OSError as error:
            raise MachineError(f"{_LIBRARY} cannot be loaded: {error}") from error
        stream, address, word = ctypes.c_void_p, ctypes.c_uint64, ctypes.c_uint32
        operation = (stream, address, word, ctypes.c_uint)
        self._wait = _function(library, "cuStreamWaitValue32_v2", *operation)
        self._write = _function(library, "cuStreamWriteValue32_v2", *operation)
        self._pointer = _function(
            library,
            "cuMemHostGetDevicePointer_v2",
            ctypes.POINTER(ctypes.c_uint64),
            ctypes.c_void_p,
            ctypes.c_uint,
        )
        self._known: dict[tuple[int, int], int] = {}

    def wait(self, stream: torch.cuda.Stream, gpu: int, address: int, value: int) -> None:
        """What follows on the stream starts when the word at a host `address` has reached
        `value`."""
        with torch.cuda.device(gpu):
            status = self._wait(
                stream.cuda_stream, self._on_gpu(gpu, address), value, _GREATER_OR_EQUAL
            )
        _check(status, "wait for a flag")

    def write(self, stream: torch.cuda.Stream, gpu: int, address: int, value: int) -> None:
        """The word at a host `address` becomes `value` when all that was appended is done."""
        with torch.cuda.device(gpu):
            status = self._write(
                stream.cuda_stream, self._on_gpu(gpu, address), value, _AFTER_ALL_WRITES
            )
        _check(status, "write a flag")

    def probe(self, stream: torch.cuda.Stream, gpu: int, flags: Flags) -> None:
        """Write the first of new flags on a stream and wait for it; `MachineError` where that does
        not work."""
        self.write(stream, gpu, flags.address(0), flags.epoch)
        stream.synchronize()
        if not flags.reached(0, flags.epoch):
            raise MachineError(f"gpu{gpu} writes no flags into host memory")
        self.wait(stream, gpu, flags.address(0), flags.epoch)
        stream.synchronize()

    def _on_gpu(self, gpu: int, address: int) -> int:
        """The address at which a GPU sees pinned memory; asked for once."""
        if (gpu, address) not in self._known:
            found = ctypes.c_uint64()
            _check(self._pointer(ctypes.byref(found), address, 0), "see a flag")
            self._known[gpu, address] = found.value
        return self._known[gpu, address]


def _function(library: ctypes.CDLL, name: str, *kinds: Any) -> Callable[..., int]:
    try:
        function: Any = getattr(library, name)
    except AttributeError as error:
        raise MachineError(f"the GPU's driver has no {name}: update it") from error
    function.argtypes, function.restype = kinds, ctypes.c_int
    return function  # type: ignore[no-any-return]


def _check(status: int, what: str) -> None:
    if status:
        raise MachineError(f"a stream of the GPU cannot {what} (CUDA error {status})")
