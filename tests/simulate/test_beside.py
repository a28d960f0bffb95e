"""A prompt streams through the last GPU while the first one decodes: phase and prediction."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner
from hybrid_plans import ONE, TWO, plan_for

from hmc.cli import cli
from hmc.errors import ContextLengthError, UsageError
from hmc.plan import Plan, save_plan
from hmc.predict.beside import BESIDE, beside

_LOAD = {"prompt": 16_384, "context": 8_192, "batch": 2}


def _plan() -> Plan:
    return plan_for("deepseek-v3", TWO, 24)


@pytest.mark.slow
def test_the_phase_leaves_the_first_gpu_to_decode() -> None:
    steps = _plan().phase(BESIDE).steps
    assert {step.resource for step in steps} == {"cpu", "h2d1", "gpu1", "d2h1", "h2d0"}
    assert {step.op for step in steps if step.resource == "h2d0"} == {"kv_in"}
    assert {step.op for step in steps if step.resource == "cpu"} == {"embed", "kv_out"}


def test_cache_rows_reach_the_first_gpu_after_they_left_the_last() -> None:
    phase = _plan().phase(BESIDE)
    out = {s.layer: s for s in phase.steps if s.resource == "d2h1" and s.layer >= 0}
    back = {step.layer: step for step in phase.steps if step.op == "kv_in"}
    assert set(out) == set(back) == set(_plan().kv.layers)
    assert all(out[layer].signal in back[layer].waits for layer in out)


def test_both_sides_stay_within_the_goals() -> None:
    found = beside(_plan(), **_LOAD)
    assert 1 < found.ttft / found.ttft_alone < 1.15
    assert 1 < found.tpot / found.tpot_alone <= found.tpot_worst / found.tpot_alone < 1.3


def test_scarce_memory_bandwidth_slows_both() -> None:
    plan = _plan()
    rates = plan.machine.rates
    assert rates is not None
    half = tuple(rate.model_copy(update={"value": rate.value / 2}) for rate in rates.read)
    poor = plan.machine.model_copy(
        update={"rates": rates.model_copy(update={"read": half})},
    )
    rich, scarce = beside(plan, **_LOAD), beside(plan, machine=poor, **_LOAD)
    assert scarce.tpot / scarce.tpot_alone > 1.5 * rich.tpot / rich.tpot_alone
    assert scarce.ttft / scarce.ttft_alone > rich.ttft / rich.ttft_alone


def test_an_unknown_preemption_costs_a_whole_kernel() -> None:
    plan = _plan()
    gpus = tuple(
        gpu.model_copy(update={"rates": gpu.rates.model_copy(update={"preempt": None})})
        for gpu in plan.machine.gpus
        if gpu.rates is not None
    )
    blind = plan.machine.model_copy(update={"gpus": gpus})
    assert beside(plan, machine=blind, **_LOAD).tpot > beside(plan, **_LOAD).tpot


def test_loads_that_cannot_be() -> None:
    with pytest.raises(UsageError, match="two GPUs"):
        beside(plan_for("deepseek-v3", ONE, 12), **_LOAD)
    with pytest.raises(ContextLengthError, match="one call"):
        beside(_plan(), prompt=10**7, context=1, batch=1)
    with pytest.raises(UsageError, match="--batch"):
        beside(_plan(), prompt=4096, context=1, batch=1000)


@pytest.mark.slow
def test_the_command_prints_both(tmp_path: object) -> None:
    plan = f"{tmp_path}/two.hmp"
    save_plan(_plan(), plan)
    arguments = ["simulate", plan, "--prompt", "8192", "--batch", "2", "--beside"]
    runner = CliRunner()
    found = json.loads(runner.invoke(cli, [*arguments, "--json"]).output)["beside"]
    assert found["ttft_ratio"] == found["ttft"] / found["ttft_alone"]
    assert "together" in runner.invoke(cli, arguments).output
