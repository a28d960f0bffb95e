"""The CPU's steps of a schedule: native kernels on host buffers, lowered as a CPU plan's are.

Each step is a program of its own, which Python calls, or all of them are one program that meets
devices by flags.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from hmc.ops import OPS
from hmc.plan import Buffer, Operand, Phase, Step
from hmc.plan.model import EXTERNAL
from hmc.runtime.device_ops.base import Work
from hmc.runtime.device_ops.shares import Call, Share
from hmc.runtime.devices.flags import Flags
from hmc.runtime.host.arena import Arena
from hmc.runtime.host.lowering import LoweredPhase, Lowering, Parts
from hmc.runtime.host.ops import host_op
from hmc.runtime.schedule.crossing import Crossing, is_native
from hmc.runtime.schedule.host_program import HostProgram

_NONE = np.zeros(0, np.int32)


class HostSteps:
    """The host's activation buffers of one phase, and the work of its native steps."""

    def __init__(self, parts: Parts, phase: Phase) -> None:
        self._parts = parts
        buffers = [each for each in phase.buffers if each.offset >= 0 and each.device == "host"]
        buffers += [  # of the last two no native step here knows
            Buffer(name=name, dtype="i32", width=1, offset=EXTERNAL)
            for name in ("ids", "positions", "rows", "logits")
        ]
        native = tuple(
            _plain(step) for step in phase.steps if step.resource == "cpu" and is_native(step)
        )
        self._phase = phase.model_copy(update={"buffers": tuple(buffers), "steps": native})
        self.lowered: list[LoweredPhase] = []
        self.arena = Arena(self._phase)

    def work(self, step: Step, share: Share) -> Work:
        """What a native step does in a call."""
        lowered = LoweredPhase(self._lowering((_plain(step),)), host_op, self._parts.pool)
        self.lowered.append(lowered)

        def work(call: Call) -> None:
            if not call.count(share):
                return
            at = np.concatenate([np.arange(*piece) for piece in share.pieces(call.tokens)])
            lowered.run(call.ids[at], call.positions[at], call.tables[at], _NONE)

        return work

    def program(self, crossing: Crossing, flags: Flags, shares: Mapping[int, Share]) -> HostProgram:
        """The steps of a crossing as one program; `shares` by step id."""
        steps = [step for step in self._phase.steps if step.id in crossing.steps]
        return HostProgram(
            self._lowering(tuple(steps)),
            host_op,
            self._parts.pool,
            steps,
            crossing,
            flags,
            [shares[step.id] for step in steps],
        )

    def tensor(self, operand: Operand) -> torch.Tensor:
        """All rows of a host buffer's columns."""
        found = torch.from_numpy(self.arena.array(operand, self.arena.max_tokens))
        return found.view(torch.bfloat16) if found.dtype == torch.uint16 else found

    @property
    def span(self) -> tuple[int, int]:
        """Address and bytes of the buffers that copies read and write."""
        inside = [each for each in self._phase.buffers if each.offset == 0]
        if not inside:
            return 0, 0
        first = Operand(buffer=inside[0].name, width=inside[0].width)
        return self.arena.address(first), self._phase.activation_bytes * self.arena.max_tokens

    def close(self) -> None:
        """Give the memory back."""
        self.arena.close()

    def _lowering(self, steps: tuple[Step, ...]) -> Lowering:
        """A lowering of some steps that computes in the arena of all."""
        some = self._phase.model_copy(update={"steps": steps})
        return Lowering(self._parts, some, arena=self.arena)


def _plain(step: Step) -> Step:
    """The step with inputs under the names a CPU phase has."""
    if OPS[step.op].where != "host":
        return step
    return step.model_copy(update={"inputs": {"ids": Operand(buffer="ids", width=1)}})
