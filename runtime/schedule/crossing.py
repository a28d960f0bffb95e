"""Which CPU steps of a phase one native program can do, and which of the phase's events are flags
then.

The program takes the CPU's steps after the last one that PyTorch does (those come first, where a
batch is split on the host): one call of it walks them all. An event between a step of the program
and a step on a device crosses by a flag; all others stay what they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hmc.plan import Phase, Step


@dataclass(frozen=True)
class Crossing:
    """`steps`: ids of the program's steps. `flags`: the flag of each event that crosses. `events`:
    those that steps outside the program wait for from outside it.
    """

    steps: frozenset[int]
    flags: Mapping[int, int]
    events: frozenset[int]


def crossing(phase: Phase) -> Crossing | None:
    """None where the CPU's last step is PyTorch's, or there is none."""
    on_cpu = [step for step in phase.steps if step.resource == "cpu"]
    first = max((at + 1 for at, step in enumerate(on_cpu) if not is_native(step)), default=0)
    inside = frozenset(step.id for step in on_cpu[first:])
    if not inside:
        return None
    signalled = {step.signal: step.id in inside for step in phase.steps if step.signal >= 0}
    waits = [(event, step.id in inside) for step in phase.steps for event in step.waits]
    crossed = sorted({event for event, mine in waits if signalled[event] != mine})
    return Crossing(
        inside,
        {event: number for number, event in enumerate(crossed)},
        frozenset(event for event, mine in waits if not mine and not signalled[event]),
    )


def is_native(step: Step) -> bool:
    """Whether a step on "cpu" is the native kernels' (rows of lanes are moved by PyTorch)."""
    return not any(key.startswith("torch:") for key in step.kernels)
