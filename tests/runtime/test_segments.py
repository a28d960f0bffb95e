"""Segments of decode phases: the rules of the module on real plans, and what they come to."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import pytest
from hybrid_plans import ONE, TWO, plan_for
from null_device import NullBackend

from hmc.plan import Phase
from hmc.runtime.schedule.runner import ScheduleRunner
from hmc.runtime.schedule.segments import segments


def decode_phases(model: str, machine: str) -> list[Phase]:
    found = [p for p in plan_for(model, machine).phases if p.name.startswith("decode")]
    assert found
    return found


@pytest.mark.parametrize("machine", [ONE, TWO])
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-30b-a3b"])
def test_segments_of_real_plans(model: str, machine: str) -> None:
    for phase in decode_phases(model, machine):
        found = segments(phase)
        assert found
        for run in found:
            steps = [phase.steps[at] for at in run]
            (resource,) = {step.resource for step in steps}
            assert resource.startswith("gpu")
            assert not {"copy", "split", "join"} & {step.op for step in steps}
            assert not any(step.waits for step in steps[1:])
            assert all(step.signal < 0 for step in steps[:-1])
            between = [phase.steps[at] for at in range(run[0], run[-1] + 1) if at not in run]
            assert all(step.resource != resource for step in between)
        inside = {at for run in found for at in run}
        assert sum(map(len, found)) == len(inside)
        # most of a GPU's steps, and none left out that would make a segment longer
        on_gpus = [at for at, step in enumerate(phase.steps) if step.resource.startswith("gpu")]
        assert len(inside) > 0.75 * len(on_gpus)
        for one, other in pairwise(run for run in found if phase.steps[run[0]].resource == "gpu0"):
            assert phase.steps[one[-1]].signal >= 0 or phase.steps[other[0]].waits


def test_where_all_experts_are_on_the_gpu_all_layers_are_one_segment() -> None:
    (phase,) = (p for p in decode_phases("qwen3-30b-a3b", ONE) if p.name == "decode")
    ops = [[phase.steps[at].op for at in run] for run in segments(phase)]
    attention = ["linear", "linear", "linear", "rotary", "rotary", "attention", "linear"]
    layer = ["add_norm", *attention, "add_norm", "linear", "route", "experts"]
    last = ["add", "gather_rows", "norm", "linear"]
    assert ops == [["norm", *layer[1:], *layer * 5, *last]]


@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-30b-a3b"])
def test_with_graphs_every_step_is_done_once_and_no_later(model: str) -> None:
    done: list[int] = []
    for phase in decode_phases(model, TWO):
        works = [partial(lambda at, call: done.append(at), at) for at in range(len(phase.steps))]
        seconds = [1.0 + at % 3 for at in range(len(phase.steps))]
        backend = NullBackend(2, 1 << 20, execute=True)
        runner = ScheduleRunner(phase, backend, works, seconds)
        streams = [backend.stream(name) for name in {step.resource for step in phase.steps}]
        ends = []
        for orders in (None, runner.graphs(None)):
            backend.begin()
            done.clear()
            runner.run_untimed(None, orders)
            assert sorted(done) == list(range(len(phase.steps)))
            ends.append([stream.time for stream in streams])
        assert ends[0] == ends[1]


def test_other_phases_have_none() -> None:
    plan = plan_for("deepseek-v3", TWO)
    others = [phase for phase in plan.phases if not phase.name.startswith("decode")]
    assert others
    assert not any(segments(phase) for phase in others)
