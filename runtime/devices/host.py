"""Devices played by the CPU: plain memory of a stated size and one real thread a stream.

The same schedules run here as on GPUs, so what a missing event breaks shows, above all with
`delays`, which make streams run ahead of each other in ways that a seed reproduces.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch

from hmc.runtime.devices.base import Clock, Stream, gpu_of, stream_name
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.gpu import Gpu
from hmc.runtime.devices.worker import Board, HostEvent, HostSpan, Worker


class HostBackend:
    """A `Backend` of threads."""

    def __init__(
        self,
        gpus: int,
        memory_bytes: int | Sequence[int],
        *,
        delays: int | None = None,
        timeout: float = 120.0,
        shared: bool = False,
    ) -> None:
        """`gpus` devices of `memory_bytes` each, or of one entry each; `timeout` seconds as in
        `Board`; with `shared`, other processes can use the memory."""
        self._board = Board(timeout)
        self._delays = delays
        sizes = [memory_bytes] * gpus if isinstance(memory_bytes, int) else memory_bytes
        self.devices = tuple(
            Gpu(f"gpu{number}", torch.device("cpu"), _room(size), shared=shared)
            for number, size in zip(range(gpus), sizes, strict=True)
        )

    def stream(self, resource: str, *, aside: bool = False) -> Worker:
        """See `base.Backend`."""
        name = stream_name(resource, aside)
        worker = self._board.workers.get(name)
        if worker is None:
            gpu_of(resource, len(self.devices))
            worker = Worker(name, self._board, self._delays)
        return worker

    def event(self) -> HostEvent:
        """See `base.Backend`."""
        return HostEvent()

    def span(self) -> HostSpan:
        """See `base.Backend`."""
        return HostSpan()

    def flags(self, count: int) -> Flags:
        """See `base.Backend`."""
        made = Flags(count)
        self._board.flags.append(made)
        return made

    def begin(self) -> Clock:
        """See `base.Backend`."""
        return time.perf_counter()

    def synchronize(self, streams: Sequence[Stream] | None = None) -> None:
        """See `base.Backend`."""
        workers = self._board.workers
        names = workers if streams is None else [stream.name for stream in streams]
        try:
            self._board.drain([workers[name] for name in names])
        except BaseException as error:
            self.close(error)
            raise

    def close(self, error: BaseException | None = None) -> None:
        """See `base.Backend`."""
        self._board.close(error)
        for device in self.devices:
            device.close()


def _room(size: int) -> Callable[[Gpu], int]:
    return lambda gpu: size - gpu.used
