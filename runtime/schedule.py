"""Runs the steps of a phase on the streams of a backend, and says when each of them ran.

Every step is handed to the stream of its resource in program order: the waits for its events, what
it does, the record of its signal. What a step does is bound elsewhere; this module hides streams,
events, and which part of a phase is one rank's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from hmc.errors import ExecutionError, VerifyError
from hmc.plan import Operand, Phase, Step
from hmc.runtime.devices.base import Backend, Event, Span, Stream
from hmc.verify import check_order

Bound = Callable[[Any], None]
"""What a step does with a call of its phase."""


@dataclass(frozen=True)
class Measured:
    """When the steps at `positions` of a phase ran, in seconds since the call began."""

    positions: tuple[int, ...]
    start: tuple[float, ...]
    finish: tuple[float, ...]

    @property
    def seconds(self) -> float:
        """When the last step ended."""
        return max(self.finish, default=0.0)


@dataclass(frozen=True)
class _Ready:
    """A step with everything that handing it over takes."""

    stream: Stream
    waits: tuple[Event, ...]
    work: Bound
    label: str
    seconds: float
    span: Span
    signal: Event | None


class ScheduleRunner:
    """One phase, ready to be run call after call. Not safe for use from several threads."""

    def __init__(
        self,
        phase: Phase,
        backend: Backend,
        works: Sequence[Bound],
        seconds: Sequence[float] | None = None,
        rank: int | None = None,
    ) -> None:
        """`works[i]` is what step i of the phase does, `seconds[i]` what it takes on a simulated
        clock. With `rank`, only that rank's part of the phase is run here (see `part_of_rank`).

        Raises `ExecutionError` where works are missing or the backend has fewer GPUs than the
        phase, `VerifyError` where a step waits for an event that no earlier step signals.
        """
        count = len(phase.steps)
        if len(works) != count or (seconds is not None and len(seconds) != count):
            raise ExecutionError(
                f"phase {phase.name} has {count} steps, but {len(works)} of them are bound"
            )
        mine = phase if rank is None else part_of_rank(phase, rank)
        places = {step.id: position for position, step in enumerate(phase.steps)}
        self.positions = tuple(places[step.id] for step in mine.steps)
        self._backend = backend
        events: dict[int, Event] = {}
        steps = []
        for position, step in zip(self.positions, mine.steps, strict=True):
            label = _label(phase, step)
            if missing := [event for event in step.waits if event not in events]:
                raise VerifyError(f"{label} waits for event {missing[0]}, which nothing signals")
            waits = tuple(events[event] for event in step.waits)
            if step.signal >= 0:
                events[step.signal] = backend.event()
            steps.append(
                _Ready(
                    backend.stream(step.resource),
                    waits,
                    works[position],
                    label,
                    0.0 if seconds is None else seconds[position],
                    backend.span(),
                    events.get(step.signal),
                )
            )
        self._steps = tuple(steps)

    def run(self, call: Any) -> Measured:
        """Run every step with `call` and return when all are done.

        Raises what `Backend.synchronize` raises; the backend is closed then.
        """
        self._run(call, timed=True)
        times = [step.span.seconds() for step in self._steps]
        return Measured(
            self.positions, tuple(start for start, _ in times), tuple(end for _, end in times)
        )

    def run_untimed(self, call: Any) -> None:
        """As `run`, without what measuring costs: two events a step on a GPU."""
        self._run(call, timed=False)

    def _run(self, call: Any, *, timed: bool) -> None:
        try:
            self._backend.begin()
            for step in self._steps:
                stream = step.stream
                for event in step.waits:
                    stream.wait(event)
                span = step.span if timed else None
                stream.launch(partial(step.work, call), step.label, step.seconds, span)
                if step.signal is not None:
                    stream.record(step.signal)
            self._backend.synchronize()
        except BaseException:
            self._backend.close()
            raise


def part_of_rank(phase: Phase, rank: int) -> Phase:
    """The steps of a phase that the process of one rank runs, when each rank has its own.

    These are the steps on the rank's GPU and its ways to and from it, its side of every exchange
    on "link", and the CPU's steps that lead to them. Waits for steps of other ranks are dropped. A
    wait orders a value or the reuse of memory: values of other ranks come through "link" alone,
    where the collective itself waits until every rank has come to it; and memory of other ranks
    is in other processes. That nothing else was lost is checked: `VerifyError` where a step would
    read what no step of this rank wrote, or is no longer ordered.
    """
    if not 0 <= rank < phase.ranks:
        raise ExecutionError(f"phase {phase.name} has {phase.ranks} rank(s), none is {rank}")
    own = {f"gpu{rank}", f"h2d{rank}", f"d2h{rank}", "link"}
    widths = {buffer.name: buffer.width for buffer in phase.buffers}
    kept: list[Step] = []
    wanted: set[str] = set()
    for whole in reversed(phase.steps):
        step = _side(whole, rank) if whole.resource == "link" else whole
        outputs = {operand.buffer for operand in step.outputs.values()}
        if step.resource not in own and not (step.resource == "cpu" and outputs & wanted):
            continue
        kept.append(step)
        wanted -= {o.buffer for o in step.outputs.values() if o.width == widths[o.buffer]}
        wanted |= {operand.buffer for operand in step.inputs.values()}
    signalled = {step.signal for step in kept}
    steps = tuple(
        step.model_copy(update={"waits": tuple(e for e in step.waits if e in signalled)})
        for step in reversed(kept)
    )
    part = phase.model_copy(update={"steps": steps})
    check_order(part)
    return part


def _side(step: Step, rank: int) -> Step:
    """An exchange with one rank's operands: x<rank> and y<rank>."""

    def of(operands: Iterable[tuple[str, Operand]]) -> dict[str, Operand]:
        return {role: operand for role, operand in operands if role[1:] == str(rank)}

    return step.model_copy(
        update={"inputs": of(step.inputs.items()), "outputs": of(step.outputs.items())}
    )


def _label(phase: Phase, step: Step) -> str:
    some = f", experts {step.attrs['range']}" if "range" in step.attrs else ""
    return f"phase {phase.name}, step {step.id} ({step.op}, layer {step.layer}{some})"
