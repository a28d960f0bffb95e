"""GPUs through torch.cuda: streams, events and memory; "cpu" is one thread beside them.

Device streams are fed by the caller's thread. What crosses between the CPU and a GPU:

* "cpu" waits for a device event by waiting for it on its own thread;
* a device stream that waits for CPU work makes the caller's thread wait until that work is done,
  since a device can wait only for what was handed to it already. This cannot hang: what the CPU
  work waits for precedes it in the program, so the GPUs have it. It ends the look-ahead at that
  point, which costs little: later steps of other streams hardly ever do without the CPU's result;
* by a flag, whoever waits does so without Python: a stream by an operation on pinned memory.

Importing this needs no GPU; opening it without one is a `MachineError`.
"""

from __future__ import annotations

import time

import torch

from hmc.errors import CapacityError, ExecutionError, HmcError, MachineError, WorkerError
from hmc.runtime.devices.base import Event, Work, gpu_of
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.gpu import Gpu
from hmc.runtime.devices.pinned import pinned
from hmc.runtime.devices.stream_memory import StreamMemory
from hmc.runtime.devices.worker import Board, HostEvent, HostSpan, Worker

CLOSE_SECONDS = 2.0
"""How long `close` waits for GPUs that are still at work."""
_POLL_SECONDS = 20e-6


class CudaEvent(HostEvent):
    """An event of the GPUs and of the CPU at once: `device` is set while a device stream was the
    last to record it."""

    def __init__(self) -> None:
        super().__init__()
        self.device: torch.cuda.Event | None = None
        self.kept: dict[int, torch.cuda.Event] = {}


class CudaSpan(HostSpan):
    """Two timing events around a piece of work on a device, read when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.origin: torch.cuda.Event | None = None
        self.marks: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def seconds(self) -> tuple[float, float]:
        """See `base.Span`; of a device, to its clock's half microsecond."""
        if self.origin is None or self.marks is None:
            return super().seconds()
        first, last = (self.origin.elapsed_time(mark) * 1e-3 for mark in self.marks)
        return first, last


class CpuStream(Worker):
    """The thread that does the CPU's work, and can wait for devices."""

    def wait(self, event: Event) -> None:
        """See `base.Stream`."""
        if event.device is None:
            super().wait(event)
        else:
            self.append(event.device.synchronize)

    def record(self, event: Event) -> None:
        """See `base.Stream`."""
        event.device = None
        super().record(event)


class CudaStream:
    """A stream of one GPU, fed by the caller's thread."""

    def __init__(self, name: str, number: int, backend: CudaBackend) -> None:
        self.name = name
        self.number = number
        self.stream = torch.cuda.Stream(device=number)  # type: ignore[no-untyped-call]
        self._backend = backend

    def launch(
        self, work: Work, label: str, seconds: float = 0.0, span: CudaSpan | None = None
    ) -> None:
        """See `base.Stream`; what the work raises while it is handed over is raised here."""
        if span is not None and span.marks is None:
            span.marks = (_event(timed=True), _event(timed=True))
        try:
            with torch.cuda.stream(self.stream):
                if span is not None and span.marks is not None:
                    span.origin = self._backend.origin(self.number)
                    span.marks[0].record(self.stream)
                work()
                if span is not None and span.marks is not None:
                    span.marks[1].record(self.stream)
        except HmcError:
            raise
        except torch.OutOfMemoryError as error:
            raise CapacityError(
                f"{label} on {self.name} found no memory for its intermediate results; compile"
                " for less (--vram, --max-context)"
            ) from error
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
            raise ExecutionError(f"{label} failed on {self.name}: {told}") from error

    def wait(self, event: CudaEvent) -> None:
        """See `base.Stream`; for CPU work the caller waits (see the module)."""
        if event.device is not None:
            self.stream.wait_event(event.device)
        elif event.made:
            self._backend.cpu_done(event)

    def record(self, event: CudaEvent) -> None:
        """See `base.Stream`."""
        mark = event.kept.get(self.number)  # an event belongs to the GPU that records it first
        if mark is None:
            mark = event.kept[self.number] = _event(timed=False)
        mark.record(self.stream)
        event.device = mark

    def set_flag(self, flags: Flags, number: int) -> None:
        """See `base.Stream`."""
        memory = self._backend.memory()
        memory.write(self.stream, self.number, flags.address(number), flags.epoch)

    def wait_flag(self, flags: Flags, number: int) -> None:
        """See `base.Stream`."""
        memory = self._backend.memory()
        memory.wait(self.stream, self.number, flags.address(number), flags.epoch)

    def synchronize(self) -> None:
        """See `base.Stream`."""
        self._backend.finish((self,))


class CudaBackend:
    """A `Backend` of the first `gpus` GPUs of this machine. Not safe for use from several threads.

    In a process that runs one rank of several, `home` is that rank's GPU: it carries "link".
    """

    def __init__(self, gpus: int, *, home: int = 0, timeout: float = 120.0) -> None:
        """Raises `MachineError` where torch has no CUDA or the machine has fewer GPUs."""
        if not torch.cuda.is_available():
            why = (
                "this PyTorch was built without CUDA: install one with it"
                if torch.version.cuda is None
                else "no driver or no GPU answers: see `nvidia-smi`"
            )
            raise MachineError(f"the plan needs {gpus} GPU(s), and {why}")
        found = torch.cuda.device_count()
        if found < gpus:
            raise MachineError(f"the plan needs {gpus} GPUs, this machine has {found}")
        self._board = Board(timeout)
        self._cpu = CpuStream("cpu", self._board)
        self._home = home
        self._streams: dict[str, CudaStream] = {}
        self._origins: dict[int, torch.cuda.Event] = {}
        self._memory: StreamMemory | None = None
        self.devices = tuple(
            Gpu(f"gpu{number}", torch.device("cuda", number), self, _room) for number in range(gpus)
        )

    def stream(self, resource: str) -> CudaStream | CpuStream:
        """See `base.Backend`."""
        if resource == "cpu":
            return self._cpu
        stream = self._streams.get(resource)
        if stream is None:
            number = gpu_of(resource, len(self.devices))
            number = self._home if number is None else number
            stream = self._streams[resource] = CudaStream(resource, number, self)
        return stream

    def event(self) -> CudaEvent:
        """See `base.Backend`."""
        return CudaEvent()

    def span(self) -> CudaSpan:
        """See `base.Backend`."""
        return CudaSpan()

    def flags(self, count: int) -> Flags:
        """See `base.Backend`. Tried out on every GPU before."""
        memory = self.memory()
        for number in range(len(self.devices)):
            trial = Flags(1, pinned(Flags.bytes(1), "a flag"))
            trial.advance()
            stream = torch.cuda.Stream(device=number)  # type: ignore[no-untyped-call]
            memory.probe(stream, number, trial)
        made = Flags(count, pinned(Flags.bytes(count), "flags"))
        self._board.flags.append(made)
        return made

    def memory(self) -> StreamMemory:
        """The driver's operations on memory; `MachineError` where it has none."""
        if self._memory is None:
            self._memory = StreamMemory()
        return self._memory

    def begin(self) -> None:
        """See `base.Backend`. Each GPU has its own zero, taken one after the other: times of two
        GPUs compare to some microseconds."""
        for number in {stream.number for stream in self._streams.values()}:
            mark = self._origins.get(number)
            if mark is None:
                mark = self._origins[number] = _event(timed=True)
            with torch.cuda.device(number):
                mark.record(torch.cuda.current_stream(number))
        self._board.origin = time.perf_counter()

    def origin(self, number: int) -> torch.cuda.Event | None:
        """The event at which a GPU's clock began."""
        return self._origins.get(number)

    def cpu_done(self, event: HostEvent) -> None:
        """Return when the CPU work that was to record an event has done so."""
        try:
            self._board.happen(event)
        except BaseException:
            self.close()
            raise

    def synchronize(self) -> None:
        """See `base.Backend`."""
        self.finish(tuple(self._streams.values()))

    def finish(self, streams: tuple[CudaStream, ...]) -> None:
        """Return when the CPU and these streams are done."""
        try:
            self._board.drain(lambda: self._cpu.busy)
            for stream in streams:
                self._poll(stream)
        except BaseException:
            self.close()
            raise

    def _poll(self, stream: CudaStream) -> None:
        until = time.perf_counter() + self._board.timeout
        try:
            while not stream.stream.query():
                if time.perf_counter() > until:
                    raise WorkerError(
                        f"{stream.name} did not end within {self._board.timeout:g} s. The devices"
                        " were closed; see `nvidia-smi` for what else they do"
                    )
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise ExecutionError(f"work on {stream.name} failed: {error}") from error

    def close(self) -> None:
        """See `base.Backend`. Memory is freed when the GPUs are done with it, or have not been for
        `CLOSE_SECONDS`."""
        self._board.close()
        until = time.perf_counter() + CLOSE_SECONDS
        while time.perf_counter() < until and not all(map(_ended, self._streams.values())):
            time.sleep(_POLL_SECONDS)
        self._streams.clear()
        for device in self.devices:
            device.close()


def _ended(stream: CudaStream) -> bool:
    """Whether a stream has nothing left to do; one that failed (`finish` tells of it) has not."""
    try:
        return bool(stream.stream.query())
    except RuntimeError:
        return True


def _event(*, timed: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def _room(gpu: Gpu) -> int:
    """Bytes that a GPU still has: the driver's, and those that torch keeps for later."""
    free, _ = torch.cuda.mem_get_info(gpu.torch_device)
    kept = torch.cuda.memory_reserved(gpu.torch_device)
    return int(free + kept - torch.cuda.memory_allocated(gpu.torch_device))
