"""Splits a decode batch in two lanes that swap GPU and CPU every layer: phase `decode.dual`.

Contract
    * without experts on the host of a hybrid plan nothing changes
    * each lane's steps are those of `decode`; lanes share weights and nothing else, so tokens do
      not depend on the split
    * taken only where the cost model predicts a gain of `WORTHWHILE`; the decision holds the
      numbers of both phases

Method
    1. the layers before the first routed one and what follows the last are computed for the whole
       batch, whose rows are split and joined around the lanes
    2. emit both lanes layer by layer in turn: while the CPU computes one lane's experts, the GPU
       computes the other lane's attention
    3. compare the timelines of both phases at growing batches; note from which batches on which
       of the two wins
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hmc.ops import OPS
from hmc.passes.emit.builder import Schedule
from hmc.passes.emit.hybrid import Lane
from hmc.passes.records import Base, Notes
from hmc.plan import Phase, Plan, Switch
from hmc.plan.phases import DECODE, DUAL
from hmc.predict.cost import Call, CostModel
from hmc.predict.timeline import run

LANES = 2
WORTHWHILE = 1.03
"""Predicted speed-up from which on two lanes are taken."""
_CONTEXT = 4_096
"""Tokens of context that the comparison assumes of every sequence."""


@dataclass(frozen=True)
class DualBatch:
    """Adds `decode.dual` where it is predicted to gain."""

    name: ClassVar[str] = "dual_batch"

    def run(self, plan: Plan, base: Base) -> Plan:
        hosted = any("host" in placement.tiers for placement in plan.placement)
        if base.budget is None or not hosted or plan.limits.max_batch < LANES:
            return plan
        notes = Notes(self.name)
        phase = _emit(base.plan.phase(DECODE), plan)
        single = plan.phase(DECODE)
        model = CostModel(plan)
        before = min(_CONTEXT, plan.limits.max_context)
        gains: dict[int, tuple[float, float]] = {}
        for batch in (2, 4, 6, 8, 16):
            if batch <= plan.limits.max_batch:
                call = Call(batch, before, batch)
                gains[batch] = run(single, call, model).result, run(phase, call, model).result
        numbers = ", ".join(
            f"batch {batch}: {one * 1e3:.1f} ms in one lane, {two * 1e3:.1f} ms in two"
            for batch, (one, two) in gains.items()
        )
        wins = {batch: one >= WORTHWHILE * two for batch, (one, two) in gains.items()}
        better = [batch for batch, won in wins.items() if won]
        if not better:
            notes.decide(DUAL, "not taken", numbers)
            return notes.on(plan)
        notes.decide(DUAL, f"taken at {', '.join(map(str, better))} sequences", numbers)
        switches = [Switch(kind="decode", phase=DECODE, tokens=1)]
        for batch, won in wins.items():
            name = DUAL if won else DECODE
            if switches[-1].phase != name:
                switches.append(Switch(kind="decode", phase=name, tokens=batch))
        return notes.on(plan, phases=(*plan.phases, phase), switches=(*plan.switches, *switches))


def _emit(base: Phase, plan: Plan) -> Phase:
    """The phase of two lanes from the CPU's `decode`."""
    schedule = Schedule(DUAL)
    placement = {each.layer: each for each in plan.placement}
    routed = [step.layer for step in base.steps if OPS[step.op].routed]
    first = next(i for i, step in enumerate(base.steps) if step.layer == min(routed))
    after = max(i for i, step in enumerate(base.steps) if step.layer == max(routed)) + 1
    whole = Lane(schedule, base, placement, whole=True)
    lanes = [Lane(schedule, base, placement, n, f"lane{n}.") for n in range(LANES)]
    whole.emit(base.steps[:first])
    whole.split(lanes, base.steps[first:])
    for _ in zip(*(lane.layers(base.steps[first:after]) for lane in lanes), strict=True):
        pass
    whole.join(lanes, base.steps[after:])
    whole.emit(base.steps[after:])
    return schedule.finish(base.max_tokens, lanes=LANES)
