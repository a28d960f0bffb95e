"""Runs a phase's steps over its resources with the cost model's durations: when each starts and
ends.

Every resource works through its steps in the plan's order; a step starts when its resource is free
and every event it waits for has been signalled. This is what an executor does, with a clock in
place of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from hmc.plan import Phase, Step
from hmc.plan.phases import prompt_calls
from hmc.predict.cost import Call, Cost, CostModel


@dataclass(frozen=True)
class Timeline:
    """Seconds from the start of the call, by position of the step."""

    start: tuple[float, ...]
    finish: tuple[float, ...]
    costs: tuple[Cost, ...]
    busy: dict[str, float]

    @property
    def seconds(self) -> float:
        """When the last step ends."""
        return max(self.finish, default=0.0)


def run(phase: Phase, call: Call, model: CostModel) -> Timeline:
    """The timeline of one call of a phase."""
    return PhaseTimer(phase, model).run(call)


class PhaseTimer:
    """Timelines of many calls of a phase. Steps of equal cost are found, and costed, once."""

    def __init__(self, phase: Phase, model: CostModel) -> None:
        self._phase, self._model = phase, model
        self._results = _results(phase)
        self._alike: dict[bool, list[int]] = {}

    def run(self, call: Call) -> Timeline:
        """The timeline of one call."""
        alike = self._first_alike(bool(call.profile))
        known: dict[int, Cost] = {}
        costs = []
        for step, first in zip(self._phase.steps, alike, strict=True):
            if first not in known:
                known[first] = self._model.step(self._phase, step, call)
            costs.append(known[first])
        return scheduled(self._phase, costs)

    def seconds(self, call: Call) -> float:
        """`result_seconds` of one call."""
        return _end(self._results, self.run(call))

    def _first_alike(self, profiled: bool) -> list[int]:
        """By position, the first step that costs the same in every call; with a profile of routing,
        experts of every layer cost their own."""
        if profiled not in self._alike:
            seen: dict[tuple[object, ...], int] = {}
            self._alike[profiled] = [
                seen.setdefault(_key(step, profiled), position)
                for position, step in enumerate(self._phase.steps)
            ]
        return self._alike[profiled]


def _key(step: Step, profiled: bool) -> tuple[object, ...]:
    return (
        step.op,
        step.resource,
        step.layer if profiled and "range" in step.attrs else step.layer < 0,
        step.weight_bytes,
        step.flops,
        bool(step.waits),
        tuple(step.attrs.items()),
        tuple((role, o.width) for role, o in step.inputs.items()),
        tuple((role, o.width) for role, o in step.outputs.items()),
    )


def schedule(phase: Phase, cost_of: Callable[[Step], Cost]) -> Timeline:
    """The timeline with given costs."""
    return scheduled(phase, [cost_of(step) for step in phase.steps])


def scheduled(phase: Phase, costs: Sequence[Cost]) -> Timeline:
    """The timeline with given costs, by position."""
    free: dict[str, float] = {}
    signalled: dict[int, float] = {}
    start, finish = [], []
    busy: dict[str, float] = {}
    for step, cost in zip(phase.steps, costs, strict=True):
        ready = free.get(step.resource, 0.0)
        for event in step.waits:
            ready = max(ready, signalled[event])
        end = ready + cost.seconds
        free[step.resource] = end
        if step.signal >= 0:
            signalled[step.signal] = end
        busy[step.resource] = busy.get(step.resource, 0.0) + cost.seconds
        start.append(ready)
        finish.append(end)
    return Timeline(tuple(start), tuple(finish), tuple(costs), busy)


def result_seconds(phase: Phase, timeline: Timeline) -> float:
    """When the last logits are there: what follows (memory given back, weights put back) delays
    nobody's token."""
    return _end(_results(phase), timeline)


def _results(phase: Phase) -> list[int]:
    """Positions of the steps that give logits."""
    return [
        position
        for position, step in enumerate(phase.steps)
        if any(operand.buffer.endswith("logits") for operand in step.outputs.values())
    ]


def _end(results: list[int], timeline: Timeline) -> float:
    return max((timeline.finish[each] for each in results), default=timeline.seconds)


def host_prefill(phase: Phase, tokens: int, model: CostModel, context: int = 0) -> list[Call]:
    """The calls in which a phase takes a prompt; logits are wanted of the last alone."""
    return [
        Call(count, context + first, logits=first + count == tokens)
        for first, count in prompt_calls(phase.max_tokens, tokens)
    ]
