"""Runs the steps of a phase on the streams of a backend, and says when each of them ran.

Every step is handed to the stream of its resource: the waits for its events, what it does, the
record of its signal; in program order, but loads ahead of it (`ahead.py`). With a native program
for the CPU's steps, that is handed over once a call in their place, and what crosses between it and
devices are flags. With graphs, so is each segment of the phase (runtime/schedule/segments.py) on
its GPU. What a step does is bound elsewhere; this module hides streams and events, and says which
part of a phase is one rank's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from hmc.errors import ExecutionError, VerifyError
from hmc.plan import Operand, Phase, Step
from hmc.plan.ahead import handed_over
from hmc.plan.order import check_order
from hmc.runtime.devices.base import Backend, Event, Span, Stream, Work
from hmc.runtime.schedule.host_program import HostProgram
from hmc.runtime.schedule.segments import segments

Bound = Callable[[Any], None]
"""What a step does with a call of its phase."""


@dataclass(frozen=True)
class Measured:
    """When each step of a phase ran, in seconds since the call began."""

    start: tuple[float, ...]
    finish: tuple[float, ...]


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
    flag_waits: tuple[int, ...] = ()
    flag: int | None = None
    segment: int | None = None


@dataclass(frozen=True)
class Orders:
    """What is handed over in a call, in this order: every step, and all but those of the program
    (None: it begins here). Opaque to callers."""

    steps: tuple[_Ready, ...]
    crossed: tuple[_Ready | None, ...]


class ScheduleRunner:
    """One phase, ready to be run call after call: one at a time, while runners of other phases may
    be at theirs."""

    def __init__(
        self,
        phase: Phase,
        backend: Backend,
        works: Sequence[Bound],
        seconds: Sequence[float] | None = None,
        program: HostProgram | None = None,
        aside: bool = False,
    ) -> None:
        """`works[i]` is what step i of the phase does, `seconds[i]` what it takes on a simulated
        clock. With a `program`, its steps are done by it in the calls it takes; `aside`, calls have
        streams of their own, so that they and those of other phases do not hold each other up.

        Raises `ExecutionError` where works are missing or the backend has fewer GPUs than the
        phase, `VerifyError` where a step waits for an event that no earlier step signals.
        """
        count = len(phase.steps)
        if len(works) != count or (seconds is not None and len(seconds) != count):
            raise ExecutionError(
                f"phase {phase.name} has {count} steps, but {len(works)} of them are bound"
            )
        self._backend = backend
        self.segments = segments(phase)
        inside = {at: number for number, run in enumerate(self.segments) for at in run}
        events: dict[int, Event] = {}
        steps = []
        for position, step in enumerate(phase.steps):
            label = _label(phase, step)
            if missing := [event for event in step.waits if event not in events]:
                raise VerifyError(f"{label} waits for event {missing[0]}, which nothing signals")
            waits = tuple(events[event] for event in step.waits)
            if step.signal >= 0:
                events[step.signal] = backend.event()
            steps.append(
                _Ready(
                    backend.stream(step.resource, aside=aside),
                    waits,
                    works[position],
                    label,
                    0.0 if seconds is None else seconds[position],
                    backend.span(),
                    events.get(step.signal),
                    segment=inside.get(position),
                )
            )
        self._steps = tuple(steps)
        self._streams = tuple({step.stream.name: step.stream for step in steps}.values())
        self._program, self._phase = program, phase
        ahead = tuple(self._steps[position] for position in handed_over(phase))
        self._orders = Orders(ahead, () if program is None else self._across(program))

    def graphs(self, call: Any) -> Orders:
        """What is handed over in calls like `call`, which have the same tensors: each segment as a
        graph of what it does with `call`. Raises what `Stream.graph` raises.

        Such a call must have been run before, and none may be under way.
        """
        graphs = []
        for number in range(len(self.segments)):
            inside = [step for step in self._steps if step.segment == number]
            works = [partial(step.work, call) for step in inside]
            graphs.append(inside[0].stream.graph(works, inside[0].label))
        whole = _joined(self._orders.steps, graphs)
        return Orders(tuple(filter(None, whole)), _joined(self._orders.crossed, graphs))

    def run(self, call: Any) -> Measured:
        """Run every step with `call` and return when all are done.

        Raises what `Backend.synchronize` raises; the backend is closed then.
        """
        clock, began = self._backend.begin(), time.monotonic()
        program = self._run(call, self._orders, timed=True)
        known = {} if program is None else program.times()
        times = []
        for step, ready in zip(self._phase.steps, self._steps, strict=True):
            if step.id in known:
                start, end = (moment - began for moment in known[step.id])
            else:
                start, end = ready.span.seconds(clock)
            times.append((start, end))
        return Measured(tuple(start for start, _ in times), tuple(end for _, end in times))

    def run_untimed(self, call: Any, orders: Orders | None = None) -> None:
        """As `run`, without what measuring costs: two events a step on a GPU. With `orders`, what
        `graphs` has made of a call with the same tensors."""
        self._run(call, orders or self._orders, timed=False)

    def _run(self, call: Any, orders: Orders, *, timed: bool) -> HostProgram | None:
        """Do a call; the program that took part in it."""
        program = self._program
        if program is not None and not program.takes(call):
            program = None
        try:
            if program is None:
                for step in orders.steps:
                    self._hand_over(step, call, step.span if timed else None)
            else:
                self._meet(program, call, orders, timed)
            self._backend.synchronize(self._streams)
        except BaseException as error:
            self._backend.close(error)
            raise
        return program

    def _hand_over(self, step: _Ready, call: Any, span: Span | None) -> None:
        for event in step.waits:
            step.stream.wait(event)
        step.stream.launch(partial(step.work, call), step.label, step.seconds, span)
        if step.signal is not None:
            step.stream.record(step.signal)

    def _meet(self, program: HostProgram, call: Any, orders: Orders, timed: bool) -> None:
        """Hand everything over with the program in place of its steps."""
        flags = program.flags
        flags.advance()
        for step in orders.crossed:
            if step is None:
                work = partial(program.run, call, timed=timed)
                label = f"phase {self._phase.name}, the CPU's steps in one program"
                self._backend.stream("cpu").launch(work, label)
                continue
            for number in step.flag_waits:
                step.stream.wait_flag(flags, number)
            self._hand_over(step, call, step.span if timed else None)
            if step.flag is not None:
                step.stream.set_flag(flags, step.flag)

    def _across(self, program: HostProgram) -> tuple[_Ready | None, ...]:
        """The steps with flags for the events that cross; None: the program, at its first step."""
        crossing = program.crossing
        flags = crossing.flags
        result: list[_Ready | None] = []
        for step, ready in zip(self._phase.steps, self._steps, strict=True):
            if step.id in crossing.steps:
                if None not in result:
                    result.append(None)
                continue
            waits = zip(step.waits, ready.waits, strict=True)
            result.append(
                replace(
                    ready,
                    waits=tuple(mark for event, mark in waits if event in crossing.events),
                    signal=ready.signal if step.signal in crossing.events else None,
                    flag_waits=tuple(
                        flags[event] for event in step.waits if event not in crossing.events
                    ),
                    flag=flags.get(step.signal),
                )
            )
        return tuple(result)


def _joined(steps: Sequence[_Ready | None], graphs: Sequence[Work]) -> tuple[_Ready | None, ...]:
    """The steps with each segment's as one in the place of the first: its waits, the graph, and the
    signal of the last."""
    result: list[_Ready | None] = []
    places: dict[int, int] = {}
    for step in steps:
        if step is None or step.segment is None:
            result.append(step)
            continue
        at = places.setdefault(step.segment, len(result))
        first = result[at] if at < len(result) else None
        if first is None:
            work, label = partial(_replay, graphs[step.segment]), f"graph of {step.label}"
            result.append(replace(step, work=work, label=label))
        else:
            seconds = first.seconds + step.seconds
            result[at] = replace(first, signal=step.signal, flag=step.flag, seconds=seconds)
    return tuple(result)


def _replay(graph: Work, call: Any) -> None:
    graph()


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
    brought = {
        operand.buffer
        for step in phase.steps
        if step.resource == f"d2h{rank}"
        for operand in step.outputs.values()
    }
    for whole in reversed(phase.steps):
        step = _side(whole, rank) if whole.resource == "link" else whole
        outputs = {operand.buffer for operand in step.outputs.values()}
        mine = step.resource in own
        if step.resource == "cpu":
            inputs = {operand.buffer for operand in step.inputs.values()}
            mine = bool(outputs & wanted if outputs else inputs & brought)
        if not mine:
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
