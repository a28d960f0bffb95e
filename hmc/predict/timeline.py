"""Runs a phase's steps over its resources with the cost model's durations: when each starts and
ends.

Every resource works through its steps in the plan's order; a step starts when its resource is free,
every event it waits for has been signalled, and the thread that hands steps over has come to it.
This is what an executor does, with a clock in place of the work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from hmc.plan import Phase, Step, Stop
from hmc.plan.ahead import handed_over
from hmc.plan.phases import prompt_calls
from hmc.predict.cost import Call, Cost, CostModel


@dataclass(frozen=True)
class Timeline:
    """Seconds from the start of a call of `phase`, by position of the step."""

    phase: Phase
    start: tuple[float, ...]
    finish: tuple[float, ...]
    costs: tuple[Cost, ...]
    busy: dict[str, float]
    given: tuple[float, ...]
    """When each step was handed over."""
    results: Sequence[int] | None = None
    """Positions of the steps that give logits, if known."""

    @property
    def seconds(self) -> float:
        """When the last step ends."""
        return max(self.finish, default=0.0)

    @cached_property
    def result(self) -> float:
        """When the last logits are there: what follows (memory given back, weights put back) delays
        nobody's token."""
        results = _results(self.phase) if self.results is None else self.results
        return max((self.finish[position] for position in results), default=self.seconds)

    @property
    def busy_till_result(self) -> dict[str, float]:
        """Busy seconds of each resource in steps that end by then."""
        busy: dict[str, float] = {}
        for step, end, cost in zip(self.phase.steps, self.finish, self.costs, strict=True):
            counted = cost.seconds if end <= self.result else 0.0
            busy[step.resource] = busy.get(step.resource, 0.0) + counted
        return busy


def run(phase: Phase, call: Call, model: CostModel) -> Timeline:
    """The timeline of one call of a phase."""
    return PhaseTimer(phase, model).run(call)


class PhaseTimer:
    """Timelines of many calls of a phase. Steps of equal cost are found, and costed, once."""

    def __init__(self, phase: Phase, model: CostModel) -> None:
        self._phase, self._model = phase, model
        self._order, self._results = handed_over(phase), _results(phase)
        seen: dict[tuple[object, ...], int] = {}
        # by position, the first step that costs the same in every call
        self._alike = [seen.setdefault(_key(s), at) for at, s in enumerate(phase.steps)]

    def run(self, call: Call) -> Timeline:
        """The timeline of one call."""
        known: dict[int, Cost] = {}
        costs = []
        for step, first in zip(self._phase.steps, self._alike, strict=True):
            if first not in known:
                known[first] = self._model.step(self._phase, step, call)
            costs.append(known[first])
        return scheduled(self._phase, costs, self._order, self._results)


def _key(step: Step) -> tuple[object, ...]:
    return (
        step.op,
        step.resource,
        step.layer < 0,
        step.weight_bytes,
        step.flops,
        bool(step.waits),
        tuple(step.attrs.items()),
        tuple((role, o.width) for role, o in step.inputs.items()),
        tuple((role, o.width) for role, o in step.outputs.items()),
    )


def _results(phase: Phase) -> list[int]:
    return [
        position
        for position, step in enumerate(phase.steps)
        if any(operand.buffer.endswith("logits") for operand in step.outputs.values())
    ]


def scheduled(
    phase: Phase,
    costs: Sequence[Cost],
    order: Sequence[int] | None = None,
    results: Sequence[int] | None = None,
) -> Timeline:
    """The timeline with given costs, by position; the `order` of `handed_over` and the positions of
    `results`, if they are known.
    """
    given, thread = [0.0] * len(costs), 0.0
    for position in handed_over(phase) if order is None else order:
        thread += costs[position].handed_over
        given[position] = thread
    free: dict[str, float] = {}
    signalled: dict[int, float] = {}
    start, finish = [], []
    busy: dict[str, float] = {}
    for step, cost, handed in zip(phase.steps, costs, given, strict=True):
        ready = max(free.get(step.resource, 0.0), handed)
        for event in step.waits:
            ready = max(ready, signalled[event])
        end = ready + cost.seconds
        free[step.resource] = end
        if step.signal >= 0:
            signalled[step.signal] = end
        busy[step.resource] = busy.get(step.resource, 0.0) + cost.seconds
        start.append(ready)
        finish.append(end)
    return Timeline(phase, tuple(start), tuple(finish), tuple(costs), busy, tuple(given), results)


def host_prefill(
    phase: Phase, tokens: int, stops: Sequence[Stop] = (), aligned: int = 1
) -> list[Call]:
    """The calls in which a phase takes a prompt that has these stops, with ends at multiples of
    `aligned` tokens; logits are wanted of the last alone."""
    return [
        Call(count, first, logits=first + count == tokens)
        for first, count in prompt_calls(phase.max_tokens, tokens, stops, aligned)
    ]
