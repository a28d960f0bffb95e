"""What ran when: time stamps of every record of native programs and of every Python segment.

A `Recorder` is handed to an executor for as long as one wants to know; without it nothing is
stamped. `chrome_trace` makes the JSON that Perfetto and chrome://tracing read.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.codegen.pool import walker
from hmc.plan import Plan, Step
from hmc.runtime.host.pool import Pool

WAIT = -1
"""In place of a step: a wait for a device."""
PYTHON = "Python"


@dataclass(frozen=True)
class ProgramRun:
    """One run of a program: `steps` i64 [n], each record's step, or `WAIT` where worker 0 waits for
    a flag; `ticks` i64 [n, workers, 2]."""

    phase: str
    steps: npt.NDArray[np.int64]
    ticks: npt.NDArray[np.int64]


@dataclass(frozen=True)
class ScheduledRun:
    """One run of a schedule over several streams, or of a Python segment of a step (then the step's
    resource is `PYTHON`): of each step, start and end in CLOCK_MONOTONIC nanoseconds.
    """

    phase: str
    steps: tuple[Step, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]


class Recorder:
    """Collects runs; `by_step` and `native_seconds` sum them up."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self._tick, self._nanosecond = pool.clock()
        self.programs: list[ProgramRun] = []
        self.schedules: list[ScheduledRun] = []

    def run(self, phase: str, records: npt.NDArray[np.int64]) -> ProgramRun:
        """Run a program's records with time stamps."""
        ticks = np.empty((len(records), self._pool.workers, 2), np.int64)
        self._pool.run(records, ticks)
        waits = records[:, 2] & walker.GATE != 0
        found = ProgramRun(phase, np.where(waits, WAIT, records[:, 3]), ticks)
        self.programs.append(found)
        return found

    def call(self, phase: str, step: Step, function: Callable[[], None], name: str) -> None:
        """Make a call for a step and note how long it took."""
        began = time.monotonic_ns()
        function()
        seconds = (time.monotonic_ns() - began) / 1e9
        shown = step.model_copy(update={"op": name, "resource": PYTHON})
        self.scheduled(phase, [shown], [0.0], [seconds], began)

    def scheduled(
        self,
        phase: str,
        steps: Iterable[Step],
        start: Iterable[float],
        stop: Iterable[float],
        began: int,
    ) -> None:
        """Note when the steps of a schedule ran: seconds since `began`, CLOCK_MONOTONIC ns."""
        first, last = (tuple(began + round(t * 1e9) for t in times) for times in (start, stop))
        self.schedules.append(ScheduledRun(phase, tuple(steps), first, last))

    def by_step(self, phase: str = "") -> dict[int, float]:
        """Seconds in kernels by step (of one phase, or of all), averaged over the workers."""
        result: dict[int, float] = defaultdict(float)
        for run in self.programs:
            if phase not in ("", run.phase):
                continue
            inside = (run.ticks[:, :, 1] - run.ticks[:, :, 0]).mean(axis=1) / self._pool.tsc_hz
            for step, seconds in zip(run.steps.tolist(), inside.tolist(), strict=True):
                if step != WAIT:
                    result[step] += seconds
        return dict(result)

    def with_python(self, phase: str) -> dict[int, float]:
        """Seconds of the steps of a phase: kernels and Python segments, or where it runs as a
        schedule, from the start to the end of each.
        """
        result: dict[int, float] = defaultdict(float)
        native = True
        for run in self.schedules:
            if run.phase == phase:
                for step, start, stop in zip(run.steps, run.start, run.stop, strict=True):
                    result[step.id] += (stop - start) / 1e9
                    native = native and step.resource == PYTHON
        for number, seconds in self.by_step(phase).items() if native else ():
            result[number] += seconds
        return dict(result)

    def native_seconds(self) -> float:
        """Seconds between the first and the last stamp of every program, summed."""
        return sum(self._pool.seconds(run.ticks) for run in self.programs)

    def microseconds(self, ticks: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        """Time stamps as microseconds since the recorder was made."""
        return (ticks - self._tick).astype(np.float64) * (1e6 / self._pool.tsc_hz)

    def since_start(self, nanoseconds: int) -> float:
        """A CLOCK_MONOTONIC time as microseconds since the recorder was made."""
        return (nanoseconds - self._nanosecond) / 1e3


def chrome_trace(plan: Plan, recorder: Recorder) -> dict[str, Any]:
    """The recorded runs in Chrome's trace event format: a row a worker, one for Python, and
    one for each stream of a schedule.
    """
    events: list[dict[str, Any]] = []
    workers = 0
    for run in recorder.programs:
        steps = {step.id: step for step in plan.phase(run.phase).steps}
        times = recorder.microseconds(run.ticks)
        workers = max(workers, times.shape[1])
        for number, stamps in zip(run.steps.tolist(), times.tolist(), strict=True):
            if number == WAIT:
                events.append(_event("wait for a device", run.phase, 0, *stamps[0]))
                continue
            step = steps[number]
            for worker, (start, stop) in enumerate(stamps):
                events.append(
                    _event(step.op, run.phase, worker, start, stop, step=number, layer=step.layer)
                )
    streams = sorted({step.resource for run in recorder.schedules for step in run.steps} - {PYTHON})
    rows = {name: workers + number for number, name in enumerate([PYTHON, *streams])}
    for schedule in recorder.schedules:
        for step, first, last in zip(schedule.steps, schedule.start, schedule.stop, strict=True):
            moments, row = map(recorder.since_start, (first, last)), rows[step.resource]
            about = {"step": step.id, "layer": step.layer}
            events.append(_event(step.op, schedule.phase, row, *moments, **about))
    names = [f"worker {number}" for number in range(workers)] + [PYTHON]
    names += [f"stream {name}" for name in streams]
    events += [
        {"name": "thread_name", "ph": "M", "pid": 1, "tid": number, "args": {"name": name}}
        for number, name in enumerate(names)
    ]
    return {"traceEvents": events, "displayTimeUnit": "ms"}


def _event(
    name: str, phase: str, row: int, start: float, stop: float, **args: int
) -> dict[str, Any]:
    event: dict[str, Any] = {
        "name": name,
        "cat": phase,
        "ph": "X",
        "pid": 1,
        "tid": row,
        "ts": round(start, 3),
        "dur": round(stop - start, 3),
    }
    return event | {"args": args} if args else event
