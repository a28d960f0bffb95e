"""The order in which steps are handed over: loads ahead of what may hold the thread up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from hybrid_plans import ONE, TWO, plan_for
from split_plans import split_plan

from hmc.plan import Phase
from hmc.plan.ahead import handed_over
from hmc.plan.phases import CHOSEN, STREAM


@pytest.fixture(scope="module", params=[ONE, TWO])
def phase(request: pytest.FixtureRequest) -> Phase:
    return plan_for("deepseek-v3", request.param, 8, vram=24).phase(STREAM)


def test_what_a_step_waits_for_precedes_it_and_streams_keep_their_order(phase: Phase) -> None:
    order = handed_over(phase)
    assert sorted(order) == list(range(len(phase.steps)))
    signalled: set[int] = set()
    for position in order:
        assert signalled.issuperset(phase.steps[position].waits)
        signalled.add(phase.steps[position].signal)
    for resource in {step.resource for step in phase.steps}:
        mine = [each for each in order if phase.steps[each].resource == resource]
        assert mine == sorted(mine)


def test_a_layers_loads_are_handed_over_before_its_sort(phase: Phase) -> None:
    """As far as the ring has room: what refills a slot waits for its experts."""
    steps, order = phase.steps, handed_over(phase)
    at = {position: number for number, position in enumerate(order)}
    sorts = {(s.layer, s.resource[-1]): n for n, s in enumerate(steps) if s.op == "sort"}
    early = late = 0
    for position, step in enumerate(steps):
        if step.op == "load" and "range" in step.attrs:
            sort = sorts[step.layer, step.resource[-1]]
            ahead = at[position] < at[sort]
            users = [
                n for n, other in enumerate(steps) if other.uses == step.fills and n < position
            ]
            refills = bool(users) and steps[users[-1]].layer == step.layer
            assert ahead or refills, step
            early, late = early + ahead, late + (position < sort)
    assert early > late == 0  # in the program each follows its sort


def test_loads_of_chosen_experts_wait_until_they_are_chosen(
    checkpoint: Callable[..., Path],
) -> None:
    phase = split_plan(checkpoint("mixtral", "fp8"), held=0.3, slow=True).phase(CHOSEN)
    chosen = [n for n, step in enumerate(phase.steps) if step.op == "load" and step.inputs]
    at = {position: number for number, position in enumerate(handed_over(phase))}
    sorts = {step.layer: n for n, step in enumerate(phase.steps) if step.op == "sort"}
    assert chosen and all(at[n] > at[sorts[phase.steps[n].layer]] for n in chosen)
