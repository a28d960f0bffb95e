"""Splits a decode batch in two lanes that swap GPU and CPU every layer: phase `decode.dual`.

Contract
    * requires "plan"; establishes "dual". Without experts on the host of a hybrid plan nothing
      changes
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

import torch.fx

from hmc.ops import OPS
from hmc.passes.context import Context
from hmc.passes.emit.builder import Schedule
from hmc.passes.emit.hybrid import Lane
from hmc.plan import Phase, Switch
from hmc.plan.phases import DECODE
from hmc.predict.cost import Call, CostModel
from hmc.predict.timeline import result_seconds, run

DUAL = "decode.dual"
LANES = 2
WORTHWHILE = 1.03
"""Predicted speed-up from which on two lanes are taken."""
_CONTEXT = 4_096
"""Tokens of context that the comparison assumes of every sequence."""


@dataclass(frozen=True)
class DualBatch:
    """Adds `decode.dual` to `context.plan` where it is predicted to gain."""

    name: ClassVar[str] = "dual_batch"
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    establishes: ClassVar[frozenset[str]] = frozenset({"dual"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        plan = context.plan
        assert plan is not None
        hosted = any("host" in placement.tiers for placement in plan.placement)
        if context.budget is None or not hosted or plan.limits.max_batch < LANES:
            return
        phase = self._emit(context)
        single = plan.phase(DECODE)
        model = CostModel(plan)
        before = min(_CONTEXT, plan.limits.max_context)
        gains: dict[int, tuple[float, float]] = {}
        for batch in (2, 4, 6, 8, 16):
            if batch <= plan.limits.max_batch:
                call = Call(batch, before, batch)
                gains[batch] = (
                    result_seconds(single, run(single, call, model)),
                    result_seconds(phase, run(phase, call, model)),
                )
        numbers = ", ".join(
            f"batch {batch}: {one * 1e3:.1f} ms in one lane, {two * 1e3:.1f} ms in two"
            for batch, (one, two) in gains.items()
        )
        wins = {batch: one >= WORTHWHILE * two for batch, (one, two) in gains.items()}
        better = [batch for batch, won in wins.items() if won]
        if not better:
            context.decide(self.name, DUAL, "not taken", numbers)
            decisions = tuple(context.decisions)
            context.plan = plan.model_copy(update={"decisions": decisions})
            return
        context.decide(
            self.name, DUAL, f"taken at {', '.join(map(str, better))} sequences", numbers
        )
        switches = [Switch(kind="decode", phase=DECODE, tokens=1)]
        for batch, won in wins.items():
            name = DUAL if won else DECODE
            if switches[-1].phase != name:
                switches.append(Switch(kind="decode", phase=name, tokens=batch))
        context.plan = plan.model_copy(
            update={
                "phases": (*plan.phases, phase),
                "switches": (*plan.switches, *switches),
                "decisions": tuple(context.decisions),
            }
        )

    def _emit(self, context: Context) -> Phase:
        schedule = Schedule(DUAL)
        base = context.bases[DECODE]
        placement = {each.layer: each for each in context.placement}
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
