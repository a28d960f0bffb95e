"""Devices with a simulated clock: exact timelines without any hardware.

Streams are numbers, the time at which what was appended to them ends. With `execute` the work is
done at once, in the order in which it was appended; else it is not done at all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from hmc.errors import ExecutionError, HmcError
from hmc.runtime.devices.base import Clock, Stream, Work, gpu_of, in_order, stream_name
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.gpu import Gpu


class NullEvent:
    """`time`: when it happens, in simulated seconds."""

    def __init__(self) -> None:
        self.time = 0.0


class NullSpan:
    """Start and end in simulated seconds."""

    def __init__(self) -> None:
        self.start = 0.0
        self.end = 0.0

    def seconds(self, clock: Clock) -> tuple[float, float]:
        """See `base.Span`."""
        return self.start, self.end


class NullStream:
    """A stream whose work takes the seconds it is said to take."""

    def __init__(self, name: str, execute: bool, flagged: dict[int, float]) -> None:
        """`flagged`: when the event of the flag at an address happens, for all streams."""
        self.name = name
        self.time = 0.0
        self._execute = execute
        self._flagged = flagged

    def launch(
        self, work: Work, label: str, seconds: float = 0.0, span: NullSpan | None = None
    ) -> None:
        """See `base.Stream`; what the work raises is raised here."""
        start = self.time
        self.time = start + seconds
        if span is not None:
            span.start, span.end = start, self.time
        if self._execute:
            try:
                work()
            except HmcError:
                raise
            except Exception as error:
                told = f"{type(error).__name__}: {error}"
                raise ExecutionError(f"{label} failed on {self.name}: {told}") from error

    def graph(self, works: Sequence[Work], label: str) -> Work:
        """See `base.Stream`."""
        return in_order(works)

    def wait(self, event: NullEvent) -> None:
        """See `base.Stream`."""
        self.time = max(self.time, event.time)

    def record(self, event: NullEvent) -> None:
        """See `base.Stream`."""
        event.time = self.time

    def set_flag(self, flags: Flags, number: int) -> None:
        """See `base.Stream`."""
        self._flagged[flags.address(number)] = self.time
        flags.set(number, flags.epoch)

    def wait_flag(self, flags: Flags, number: int) -> None:
        """See `base.Stream`."""
        self.time = max(self.time, self._flagged.get(flags.address(number), 0.0))


class NullBackend:
    """A `Backend` with a simulated clock."""

    def __init__(self, gpus: int, memory_bytes: int, *, execute: bool = False) -> None:
        """`gpus` devices of `memory_bytes` each, in CPU memory."""
        self._execute = execute
        self._closed = False
        self._streams: dict[str, NullStream] = {}
        self._flagged: dict[int, float] = {}
        self.devices = tuple(
            Gpu(f"gpu{number}", torch.device("cpu"), lambda gpu: memory_bytes - gpu.used)
            for number in range(gpus)
        )

    def stream(self, resource: str, *, aside: bool = False) -> NullStream:
        """See `base.Backend`."""
        name = stream_name(resource, aside)
        stream = self._streams.get(name)
        if stream is None:
            gpu_of(resource, len(self.devices))
            stream = self._streams[name] = NullStream(name, self._execute, self._flagged)
        return stream

    def event(self) -> NullEvent:
        """See `base.Backend`."""
        return NullEvent()

    def span(self) -> NullSpan:
        """See `base.Backend`."""
        return NullSpan()

    def flags(self, count: int) -> Flags:
        """See `base.Backend`."""
        return Flags(count)

    def begin(self) -> Clock:
        """Set every clock to zero: a call is over when it has been handed over, so none overlap."""
        for stream in self._streams.values():
            stream.time = 0.0

    def synchronize(self, streams: Sequence[Stream] | None = None) -> None:
        """Nothing is ever left to do; errors were raised where the work was appended."""

    def close(self, error: BaseException | None = None) -> None:
        """See `base.Backend`."""
        for device in self.devices:
            device.close()
