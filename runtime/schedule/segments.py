"""Which steps of a decode phase a GPU can be handed as one piece, a graph.

Contract
    * a segment is a run of at least two steps that follow each other on one "gpu<n>", whatever
      steps other resources have in between;
    * none of its steps looks at values on the host, or moves rows between devices;
    * its first step alone waits for events, its last alone signals one: all of it can be begun when
      the first may, and nobody elsewhere waits for a part of it.
"""

from __future__ import annotations

from hmc.ops import OPS
from hmc.plan import Phase
from hmc.plan.memory import kind_of

_LEAST = 2


def segments(phase: Phase) -> tuple[tuple[int, ...], ...]:
    """Positions in the phase of each segment's steps, ascending; none but in phases of decode."""
    if kind_of(phase) != "decode":
        return ()
    found: list[list[int]] = []
    open_on: dict[str, list[int]] = {}
    for position, step in enumerate(phase.steps):
        if not step.resource.startswith("gpu"):
            continue
        if not OPS[step.op].captured:
            open_on.pop(step.resource, None)
            continue
        if step.waits or step.resource not in open_on:
            open_on[step.resource] = []
            found.append(open_on[step.resource])
        open_on[step.resource].append(position)
        if step.signal >= 0:
            del open_on[step.resource]
    return tuple(tuple(each) for each in found if len(each) >= _LEAST)
