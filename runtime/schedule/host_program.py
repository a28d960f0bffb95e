"""All CPU steps of a call as one native program, which waits for devices and lets them wait by
flags: between its steps there is no Python.

    program = host_steps.program(steps, crossing, flags, shares)
    flags.advance()
    program.run(call)       # on a thread of its own: it ends when the devices have done their part

Hides which records belong to which step, and to the rows it works on.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hmc.errors import ExecutionError
from hmc.plan import Step
from hmc.runtime.device_ops.shares import ALL, Call, Share
from hmc.runtime.devices.flags import Flags
from hmc.runtime.host.lowering import Lowering, OpFunctions
from hmc.runtime.host.pool import Pool
from hmc.runtime.host.program import Program
from hmc.runtime.host.trace import ProgramRun, Recorder
from hmc.runtime.schedule.crossing import Crossing


@dataclass
class _Part:
    """Records [start, stop) of the program are a step's, on the rows of its share; their `tokens`
    words hold `count`."""

    start: int
    stop: int
    share: Share
    count: int = -1


class HostProgram:
    """One phase's CPU steps, ready to be run call after call."""

    def __init__(
        self,
        lowering: Lowering,
        ops: OpFunctions,
        pool: Pool,
        steps: Iterable[Step],
        crossing: Crossing,
        flags: Flags,
        shares: Sequence[Share],
    ) -> None:
        """`steps` of the lowering's phase with the share of each. `ExecutionError` for one that
        reads ids or positions of some rows only; `KernelError` when a kernel cannot be built."""
        self.crossing, self.flags, self.name = crossing, flags, lowering.phase.name
        self.recorder: Recorder | None = None
        self._arena, self._pool = lowering.arena, pool
        self._parts: list[_Part] = []
        for step, share in zip(steps, shares, strict=True):
            if share != ALL and {"ids", "positions"} & {o.buffer for o in step.inputs.values()}:
                raise ExecutionError(
                    f"phase {self.name}, step {step.id} ({step.op}) reads inputs of a part of the"
                    " call: no program of several shares does"
                )
            for event in step.waits:
                if event in crossing.flags:
                    lowering.await_flag(step, flags, crossing.flags[event], pool.spin_ticks)
            start = lowering.records
            ops(step.op)(lowering, step)
            self._parts.append(_Part(start, lowering.records, share))
            if step.signal in crossing.flags:
                lowering.set_flag(step, flags, crossing.flags[step.signal])
        self.program: Program = lowering.build()
        self._last: ProgramRun | None = None

    def takes(self, call: Call) -> bool:
        """Whether every step has a row in this call."""
        return all(call.count(part.share) for part in self._parts)

    def run(self, call: Call, *, timed: bool = False) -> None:
        """Walk the program once, in the epoch of its flags. Returns early where they are given up:
        why, the backend tells."""
        self._arena.enter(call.ids, call.positions, call.tables)
        for part in self._parts:
            if part.count != (count := call.count(part.share)):
                self.program.patch_all(part.start, part.stop, tokens=count)
                part.count = count
        self.program.patch_all(epoch=self.flags.epoch)
        records = self.program.records
        if self.recorder is not None:
            self._last = self.recorder.run(self.name, records)
        elif timed:
            ticks = np.zeros((len(records), self._pool.workers, 2), np.int64)
            self._pool.run(records, ticks)
            self._last = ProgramRun(self.name, records[:, 3], ticks)
        else:
            self._pool.run(records)

    def times(self) -> dict[int, tuple[float, float]]:
        """By step id, when it began and ended in the last timed call, in seconds of
        CLOCK_MONOTONIC. Waiting for flags belongs to no step."""
        assert self._last is not None
        tick, nanosecond = self._pool.clock()
        seconds = (self._last.ticks - tick) / self._pool.tsc_hz + nanosecond * 1e-9
        return {
            int(self.program.records[part.start, 3]): (
                float(seconds[part.start : part.stop, :, 0].min()),
                float(seconds[part.start : part.stop, :, 1].max()),
            )
            for part in self._parts
        }
