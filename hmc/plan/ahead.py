"""In which order the steps of a phase are handed over.

A thread that hands over may be held up by a step that looks at values; copies of weights that could
run meanwhile must be with the GPU by then. So loads come as early as what they wait for allows,
each way to a GPU keeping its own order; all else stays in the order of the program.
"""

from __future__ import annotations

from collections import deque

from hmc.ops import OPS
from hmc.plan.model import Phase


def handed_over(phase: Phase) -> tuple[int, ...]:
    """Positions of the phase's steps, in the order in which they are handed over. What a step waits
    for precedes it.
    """
    steps = phase.steps
    ways: dict[str, deque[int]] = {}
    for position, step in enumerate(steps):
        if step.resource.startswith("h2d"):
            ways.setdefault(step.resource, deque()).append(position)
    result: list[int] = []
    signalled: set[int] = set()

    def hand_over(position: int) -> None:
        result.append(position)
        signalled.add(steps[position].signal)

    def early(position: int) -> bool:
        """A load of experts that tokens chose must wait until they have."""
        step = steps[position]
        return OPS[step.op].loads and not step.inputs and signalled.issuperset(step.waits)

    for position, step in enumerate(steps):
        for way in ways.values():
            while way and early(way[0]):
                hand_over(way.popleft())
        own = ways.get(step.resource)
        if own is None:
            hand_over(position)
        while own and own[0] <= position:
            hand_over(own.popleft())
    return tuple(result)
