"""GPUs through torch.cuda: streams, events and memory; "cpu" is one thread beside them.

Device streams are fed by the callers' threads. What crosses between the CPU and a GPU:

* "cpu" waits for a device event by waiting for it on its own thread;
* a device stream waits for CPU work by an operation on a word of pinned memory, as it does for a
  flag, so that whoever hands over goes on. Where the driver has no such operations, the caller's
  thread waits until that work is done. This cannot hang: what the CPU work waits for precedes it
  in what is handed over, so the GPUs have it.

"link" moves rows between GPUs and launches on all of them: it has a stream on each, which begin and
end together.

Importing this needs no GPU; opening it without one is a `MachineError`.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch

from hmc.env import uncollected
from hmc.errors import CapacityError, ExecutionError, HmcError, MachineError, WorkerError
from hmc.runtime.devices.base import Event, Stream, Work, gpu_of, stream_name
from hmc.runtime.devices.cuda_flags import StreamMemory
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.gpu import Gpu
from hmc.runtime.devices.pinned import pinned
from hmc.runtime.devices.worker import Board, HostEvent, HostSpan, Worker

CLOSE_SECONDS = 2.0
"""How long `close` waits for GPUs that are still at work."""
_FIRST, _ASIDE = -1, 0
"""Priorities of streams: less is more urgent."""
_POLL_SECONDS = 20e-6


class CudaEvent(HostEvent):
    """An event of the GPUs and of the CPU at once: `device` is set while a device stream was the
    last to record it. Devices see the CPU's records by `flag`, where they can."""

    def __init__(self) -> None:
        super().__init__()
        self.device: torch.cuda.Event | None = None
        self.kept: dict[int, torch.cuda.Event] = {}
        self.flag: Flags | None = None


@dataclass(frozen=True)
class CudaClock:
    """When a call began: as `time.perf_counter` tells it, and as an event of each GPU."""

    host: float
    devices: Mapping[int, torch.cuda.Event]


class CudaSpan(HostSpan):
    """Two timing events around a piece of work on a device, read when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0
        self.marks: tuple[torch.cuda.Event, torch.cuda.Event] | None = None

    def seconds(self, clock: CudaClock) -> tuple[float, float]:
        """See `base.Span`; of a device, to its clock's half microsecond."""
        if self.marks is None:
            return super().seconds(clock.host)
        origin = clock.devices[self.number]
        first, last = (origin.elapsed_time(mark) * 1e-3 for mark in self.marks)
        return first, last


class CpuStream(Worker):
    """The thread that does the CPU's work, and can wait for devices."""

    def __init__(self, name: str, board: Board, backend: CudaBackend) -> None:
        super().__init__(name, board)
        self._backend = backend

    def wait(self, event: Event) -> None:
        """See `base.Stream`."""
        if event.device is None:
            super().wait(event)
        else:
            self.append(event.device.synchronize)

    def record(self, event: Event) -> None:
        """See `base.Stream`."""
        event.device = None
        if event.flag is None:
            event.flag = self._backend.flag()
        super().record(event)
        if event.flag is not None:
            event.flag.epoch = event.made

    def happened(self, event: Event, made: int) -> None:
        """Also told to devices."""
        super().happened(event, made)
        if event.flag is not None:
            event.flag.set(0, made)


class CudaStream:
    """A stream of one GPU, fed by the caller's thread."""

    def __init__(self, name: str, number: int, backend: CudaBackend, priority: int) -> None:
        self.name = name
        self.number = number
        self.stream = _stream(number, priority)
        self._backend = backend
        everywhere = name.startswith("link")
        self._others = [
            _stream(other, priority)
            for other in range(len(backend.devices) if everywhere else 0)
            if other != number
        ]

    def launch(
        self, work: Work, label: str, seconds: float = 0.0, span: CudaSpan | None = None
    ) -> None:
        """See `base.Stream`; what the work raises while it is handed over is raised here."""
        if span is not None and span.marks is None:
            span.number, span.marks = self.number, (_event(timed=True), _event(timed=True))
        try:
            with ExitStack() as stack:
                if self._others:
                    begin = self.mark()
                for other in self._others:
                    other.wait_event(begin)
                    stack.enter_context(torch.cuda.stream(other))
                stack.enter_context(torch.cuda.stream(self.stream))
                if span is not None and span.marks is not None:
                    span.marks[0].record(self.stream)
                work()
                for other in self._others:
                    end = _event(timed=False)
                    end.record(other)
                    self.stream.wait_event(end)
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

    def graph(self, works: Sequence[Work], label: str) -> Work:
        """See `base.Stream`. The works are looked at and not done. Other threads may go on."""
        graph = torch.cuda.CUDAGraph()
        try:
            # a collection could free memory of the device meanwhile, which ends the capture
            with torch.cuda.stream(self.stream), uncollected():
                graph.capture_begin(
                    pool=self._backend.graph_pool(), capture_error_mode="thread_local"
                )
                try:
                    for work in works:
                        work()
                except BaseException:
                    with suppress(RuntimeError):  # tells of the same again
                        graph.capture_end()
                    raise
                graph.capture_end()
        except Exception as error:
            self._backend.drop_graph_pool()
            told = f"{type(error).__name__}: {error}".splitlines()[0]
            raise ExecutionError(f"{label} cannot be captured on {self.name}: {told}") from error
        replay: Work = graph.replay
        return replay

    def wait(self, event: CudaEvent) -> None:
        """See `base.Stream`; where a device cannot wait for CPU work, the caller does."""
        if event.device is not None:
            self.stream.wait_event(event.device)
        elif event.flag is not None:
            address = event.flag.address(0)
            self._backend.memory().wait(self.stream, self.number, address, event.made)
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

    def mark(self) -> torch.cuda.Event:
        """A new event at the end of what was appended so far."""
        end = _event(timed=False)
        end.record(self.stream)
        return end


class CudaBackend:
    """A `Backend` of the first `gpus` GPUs of this machine.

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
        self._cpus: dict[str, CpuStream] = {}
        self._home = home
        self._streams: dict[str, CudaStream] = {}
        self._memory: StreamMemory | None = None
        self._no_memory: MachineError | None = None
        self._graph_pool: Any = None
        self.devices = tuple(
            Gpu(f"gpu{number}", torch.device("cuda", number), _room) for number in range(gpus)
        )

    def stream(self, resource: str, *, aside: bool = False) -> CudaStream | CpuStream:
        """See `base.Backend`. A GPU begins blocks of the first streams' kernels before those of
        streams aside."""
        name = stream_name(resource, aside)
        if resource == "cpu":
            if name not in self._cpus:
                self._cpus[name] = CpuStream(name, self._board, self)
            return self._cpus[name]
        stream = self._streams.get(name)
        if stream is None:
            number = gpu_of(resource, len(self.devices))
            number = self._home if number is None else number
            stream = CudaStream(name, number, self, _ASIDE if aside else _FIRST)
            self._streams[name] = stream
        return stream

    def event(self) -> CudaEvent:
        """See `base.Backend`."""
        return CudaEvent()

    def span(self) -> CudaSpan:
        """See `base.Backend`."""
        return CudaSpan()

    def flags(self, count: int) -> Flags:
        """See `base.Backend`."""
        self.memory()
        made = Flags(count, pinned(Flags.bytes(count), "flags"))
        self._board.flags.append(made)
        return made

    def flag(self) -> Flags | None:
        """One flag, where the devices have them."""
        try:
            return self.flags(1)
        except MachineError:
            return None

    def memory(self) -> StreamMemory:
        """The driver's operations on memory, tried out on every GPU before they are used;
        `MachineError` where it has none, or they do not work."""
        if self._no_memory is not None:
            raise self._no_memory
        if self._memory is None:
            try:
                memory = StreamMemory()
                for number in range(len(self.devices)):
                    trial = Flags(1, pinned(Flags.bytes(1), "a flag"))
                    trial.advance()
                    memory.probe(_stream(number, _FIRST), number, trial)
            except MachineError as error:
                self._no_memory = error
                raise
            self._memory = memory
        return self._memory

    def graph_pool(self) -> Any:
        """Memory for what graphs make in between: one for all, since no two of a GPU's graphs are
        at work at once, and none leaves there what another one reads."""
        if self._graph_pool is None:
            self._graph_pool = torch.cuda.graph_pool_handle()
        return self._graph_pool

    def drop_graph_pool(self) -> None:
        """After a capture that failed, its memory serves no other: the next graph makes anew."""
        self._graph_pool = None

    def begin(self) -> CudaClock:
        """See `base.Backend`. Each GPU has its own zero, taken one after the other: times of two
        GPUs compare to some microseconds."""
        marks = {}
        for number in {stream.number for stream in self._streams.values()}:
            marks[number] = _event(timed=True)
            with torch.cuda.device(number):
                marks[number].record(torch.cuda.current_stream(number))
        return CudaClock(time.perf_counter(), marks)

    def cpu_done(self, event: HostEvent) -> None:
        """Return when the CPU work that was to record an event has done so."""
        try:
            self._board.happen(event)
        except BaseException as error:
            self.close(error)
            raise

    def synchronize(self, streams: Sequence[Stream] | None = None) -> None:
        """See `base.Backend`."""
        every = (*self._cpus.values(), *self._streams.values())
        chosen = every if streams is None else streams
        try:
            ends = [(each, each.mark()) for each in chosen if isinstance(each, CudaStream)]
            self._board.drain([each for each in chosen if isinstance(each, Worker)])
            for stream, end in ends:
                self._poll(stream, end)
            self._board.check()
        except BaseException as error:
            self.close(error)
            raise

    def _poll(self, stream: CudaStream, end: torch.cuda.Event) -> None:
        """Return when a stream has come to an event."""
        until = time.perf_counter() + self._board.timeout
        try:
            while not end.query():  # type: ignore[no-untyped-call]
                self._board.check()
                if time.perf_counter() > until:
                    raise WorkerError(
                        f"{stream.name} did not end within {self._board.timeout:g} s. The devices"
                        " were closed; see `nvidia-smi` for what else they do"
                    )
                time.sleep(_POLL_SECONDS)
        except RuntimeError as error:
            raise ExecutionError(f"work on {stream.name} failed: {error}") from error

    def close(self, error: BaseException | None = None) -> None:
        """See `base.Backend`. Memory is freed when the GPUs are done with it, or have not been for
        `CLOSE_SECONDS`."""
        self._board.close(error)
        until = time.perf_counter() + CLOSE_SECONDS
        while time.perf_counter() < until and not all(map(_ended, self._streams.values())):
            time.sleep(_POLL_SECONDS)
        for device in self.devices:
            device.close()


def _ended(stream: CudaStream) -> bool:
    """Whether a stream has nothing left to do; one that failed (`finish` tells of it) has not."""
    try:
        return bool(stream.stream.query())
    except RuntimeError:
        return True


def _stream(number: int, priority: int) -> torch.cuda.Stream:
    return torch.cuda.Stream(device=number, priority=priority)  # type: ignore[no-untyped-call]


def _event(*, timed: bool) -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=timed)  # type: ignore[no-untyped-call]


def _room(gpu: Gpu) -> int:
    """Bytes that a GPU still has: the driver's, and those that torch keeps for later."""
    free, _ = torch.cuda.mem_get_info(gpu.torch_device)
    kept = torch.cuda.memory_reserved(gpu.torch_device)
    return int(free + kept - torch.cuda.memory_allocated(gpu.torch_device))
