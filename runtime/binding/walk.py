"""What follows from the order of a phase's steps: the rows each works on, which experts steps add
to y, and which load filled the slots a step uses.
"""

from __future__ import annotations

from hmc.ops import OPS
from hmc.plan import Phase, Step
from hmc.runtime.device_ops.shares import ALL, WANTED, Share


def walked(
    phase: Phase,
) -> tuple[dict[int, Share], set[int], dict[int, dict[str, int]]]:
    """By step id: its share; whether it adds to y; the load step each slot it uses was filled by.

    In program order: the rows wanted are all there is after `gather_rows`, and experts add to a y
    that experts of the same layer and lane wrote last.
    """
    shares: dict[int, Share] = {}
    adding: set[int] = set()
    holding: dict[int, dict[str, int]] = {}
    writer: dict[str, tuple[str, int, int]] = {}
    filled: dict[str, int] = {}
    picked = False
    for step in phase.steps:
        picked = picked or OPS[step.op].picks
        shares[step.id] = WANTED if picked else _share(phase, step)
        me = step.op, step.layer, step.lane
        for operand in step.outputs.values():
            if OPS[step.op].routed and writer.get(operand.buffer) == me:
                adding.add(step.id)
            writer[operand.buffer] = me
        holding[step.id] = {name: filled[name] for name in step.uses}
        filled.update(dict.fromkeys(step.fills, step.id))
    return shares, adding, holding


def _share(phase: Phase, step: Step) -> Share:
    """The share of a step before the wanted rows are picked."""
    if "ranks" in step.attrs:
        return Share("rank", _rank(step), phase.ranks)
    if phase.lanes > 1 and "whole" not in step.attrs:
        return Share("lane", step.lane, phase.lanes)
    return ALL


def _rank(step: Step) -> int:
    """The rank a step works for; the CPU embeds for all, and its inputs tell."""
    if step.resource != "cpu":
        return int(step.resource[3:])
    name = step.inputs["ids"].buffer
    return int(name.partition(".")[0].removeprefix("r"))
