"""Chooses whose kernels attend on GPUs in decode: hmc's own, or those of the library of paged
attention where it was asked for.

Contract
    * steps of decode phases that attend are named after their kernels; nothing else changes
    * what the library cannot compute is refused, and never computed by something else
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hmc.errors import UsageError
from hmc.ops import OPS
from hmc.ops.row import PAGED
from hmc.passes.records import Base, Notes
from hmc.plan import Phase, Plan, Step
from hmc.plan.memory import device_of, kind_of


@dataclass(frozen=True)
class DecodeAttention:
    """Names the kernels."""

    name: ClassVar[str] = "decode_attention"
    attention: str = "triton"

    def run(self, plan: Plan, base: Base) -> Plan:
        if self.attention != PAGED:
            return plan
        phases = [_named(phase) if kind_of(phase) == "decode" else phase for phase in plan.phases]
        if phases == list(plan.phases):
            raise UsageError(f"--attention {PAGED}: no GPU attends in decode: leave it out")
        notes = Notes(self.name)
        notes.decide("attention of decode", PAGED, "asked for, on GPUs")
        return notes.on(plan, phases=tuple(phases))


def _named(phase: Phase) -> Phase:
    return phase.model_copy(update={"steps": tuple(map(_by_library, phase.steps))})


def _by_library(step: Step) -> Step:
    row = OPS[step.op]
    if row.paged is None or device_of(step.resource) == "host":
        return step
    if lacks := row.paged(step.attrs, step.weights):
        raise UsageError(
            f"--attention {PAGED}: layer {step.layer} has {lacks}, which it does not compute:"
            " leave it out"
        )
    return step.model_copy(update={"kernels": (row.device_kernel(step.attrs, PAGED),)})
