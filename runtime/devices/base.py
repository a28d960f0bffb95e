"""What a schedule needs of devices: memory, streams, events and clocks, whatever is behind them.

Two backends implement it: `cuda` (GPUs) and `host` (CPU memory and one real thread a stream, so
that the same schedules run, and their ordering bugs show, without a GPU); tests have one with a
simulated clock.
Streams are those of a plan's resources: "cpu", "gpu<n>", "h2d<n>", "d2h<n>" and "link". A stream
works through what it was given in order; streams know of each other only through events.

Calls of several phases may overlap, each handed over by a thread of its own. On a stream that both
use, their work is done in the order in which it was handed over, and what waits there holds up what
follows, whosever it is. A call that goes on beside others therefore takes streams of its own
(`aside`). The pool of workers is one for all of them: native programs take turns.

Hides threads, device streams, and who waits for whom in which way.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from hmc.errors import ExecutionError
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.gpu import Gpu

Work = Callable[[], None]

_RESOURCE = re.compile(r"cpu|link|(?:gpu|h2d|d2h)(\d+)")


Event = Any
"""A point in a stream's work, opaque to callers; valid on all streams of its backend, and may be
recorded again in every call. Waiting for one that nobody recorded yet waits for nothing.
"""

Clock = Any
"""When a call began, opaque to callers."""


class Span(Protocol):
    """When one piece of work ran; may be used again in every call."""

    def seconds(self, clock: Clock) -> tuple[float, float]:
        """Start and end in seconds since the `begin` of its call; known after `synchronize`."""
        ...


class Stream(Protocol):
    """A queue of work that runs in order."""

    @property
    def name(self) -> str:
        """The resource: "cpu", "gpu0", "h2d0", "d2h0", "link"; aside: "gpu0.aside"."""
        ...

    def launch(self, work: Work, label: str, seconds: float = 0.0, span: Any = None) -> None:
        """Append a piece of work. `label` names it in errors, `seconds` is what it takes on a
        simulated clock; `span`, a `Span` of this backend, notes when it ran."""
        ...

    def graph(self, works: Sequence[Work], label: str) -> Work:
        """The works in their order as one piece of work, to be launched on this stream again and
        again: with the tensors that they use now, and nothing else of what they depend on.

        They must have been launched here before, and nothing may be under way. Raises
        `ExecutionError`, after which the stream goes on, where the device cannot do that.
        """
        ...

    def wait(self, event: Event) -> None:
        """What follows starts only after the latest `record` of the event made so far."""
        ...

    def record(self, event: Event) -> None:
        """The event happens when all that was appended before is done."""
        ...

    def set_flag(self, flags: Flags, number: int) -> None:
        """A flag's event has happened in this call when all that was appended before is done."""
        ...

    def wait_flag(self, flags: Flags, number: int) -> None:
        """What follows starts only when a flag's event has happened in this call (see
        `Flags.advance`), whoever sets it."""
        ...


class Backend(Protocol):
    """All devices of one kind, with the host's stream "cpu" and the stream "link" between them.

    Streams, events and flags are made by one thread before any call; calls may then be handed over
    and waited for by several."""

    @property
    def devices(self) -> tuple[Gpu, ...]:
        """gpu0, gpu1, ..."""
        ...

    def stream(self, resource: str, *, aside: bool = False) -> Stream:
        """The stream of a resource, made on first use; `ExecutionError` for an unknown one. With
        `aside` the second one there, whose work gives way to the first's where the device can do
        that.
        """
        ...

    def event(self) -> Event:
        """A new event."""
        ...

    def span(self) -> Span:
        """A new span."""
        ...

    def flags(self, count: int) -> Flags:
        """Flags by which streams and native programs meet. They are given up when a stream fails
        or the backend is closed. `MachineError` where the devices cannot do that."""
        ...

    def begin(self) -> Clock:
        """Start the clock of a call, for its spans."""
        ...

    def synchronize(self, streams: Sequence[Stream] | None = None) -> None:
        """Return when what was appended to `streams` (default: all) so far is done.

        The first error of any stream stops all of them: what they still had to do is dropped, the
        backend is closed, and the error raised to everybody who waits, as it is where it is an
        `HmcError`, else inside an `ExecutionError` that names stream and label. Where nothing ends
        in time on the streams waited for, that is reported by a `WorkerError` and not waited for.
        """
        ...

    def close(self, error: BaseException | None = None) -> None:
        """Drop what still waits, end the streams and free all memory. Never hangs; may be called
        twice, from any thread. Whoever waits or comes later is told of the first `error`."""
        ...


def gpu_of(resource: str, gpus: int) -> int | None:
    """The number of the GPU that a resource belongs to (None: "cpu" and "link").

    Raises `ExecutionError` for a resource that `gpus` GPUs do not have.
    """
    found = _RESOURCE.fullmatch(resource)
    if found is None:
        raise ExecutionError(f"no stream is called '{resource}': cpu, link, gpu<n>, h2d<n>, d2h<n>")
    if found[1] is None:
        return None
    if int(found[1]) >= gpus:
        raise ExecutionError(f"'{resource}' is asked for, but only {gpus} GPU(s) are open")
    return int(found[1])


def in_order(works: Sequence[Work]) -> Work:
    """A graph of devices that are played: the works as they are, with what they were bound to."""

    def graph() -> None:
        for work in works:
            work()

    return graph


def stream_name(resource: str, aside: bool) -> str:
    """What a stream is called."""
    return f"{resource}.aside" if aside else resource
