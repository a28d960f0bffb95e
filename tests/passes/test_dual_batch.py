"""Hybrid decode and its form in two lanes: order, events, decisions, overlap."""

from __future__ import annotations

import random

import pytest
from hybrid_plans import CONFIGS, ONE, TWO, named, plan_for, waits_of, with_phase, without_wait

from hmc.compiler import compile as compile_plan
from hmc.errors import VerifyError
from hmc.machine.model import Rate
from hmc.plan import Plan
from hmc.plan.verify import verify_plan
from hmc.predict.cost import Call, Cost, CostModel
from hmc.predict.timeline import run, scheduled

DUAL = "decode.dual"


def _plan(machine: str = ONE, model: str = "deepseek-v3") -> Plan:
    """Most routed experts on the host."""
    return plan_for(model, machine, 10 if machine == ONE else 16, vram=18)


@pytest.mark.few(3)
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-30b-a3b-fp8", "mixtral-8x7b"])
@pytest.mark.parametrize("machine", [ONE, TWO])
def test_hybrid_decode_computes_every_layer_where_its_weights_are(model: str, machine: str) -> None:
    plan = plan_for(model, machine, 12, vram=7 if "qwen" in model else 18)
    phase = plan.phase("decode")
    for step in phase.steps:
        kind = step.resource.rstrip("0123456789")
        if step.op == "embed":
            assert kind == "cpu"
        elif step.op == "copy":
            assert kind in ("h2d", "d2h")
        elif step.op != "experts":
            assert step.resource == "gpu0"
    for placement in plan.placement:
        homes = {
            "host" if step.resource == "cpu" else step.resource
            for step in phase.steps
            if step.op == "experts" and step.layer == placement.layer
        }
        assert homes == set(placement.tiers)


@pytest.mark.few(1)
@pytest.mark.parametrize("phase", ["decode", DUAL])
@pytest.mark.parametrize("machine", [ONE, TWO])
def test_a_dropped_event_is_always_caught(machine: str, phase: str) -> None:
    plan = _plan(machine)
    dropped = random.Random(1).sample(waits_of(plan.phase(phase)), 30)
    for at, event in dropped:
        broken = with_phase(
            plan, phase, lambda each, at=at, event=event: without_wait(each, at, event)
        )
        with pytest.raises(VerifyError, match=f"phase {phase}, step"):
            verify_plan(broken)


def test_lanes_share_weights_and_nothing_else() -> None:
    phase = _plan().phase(DUAL)
    used: dict[int, set[str]] = {0: set(), 1: set()}
    for step in phase.steps:
        if "whole" in step.attrs or step.op in ("split", "join"):
            continue
        names = {o.buffer for o in (*step.inputs.values(), *step.outputs.values())}
        used[step.lane] |= names
    assert used[0] and used[1]
    assert not used[0] & used[1]
    weights = [
        sorted(str(step.weights) for step in phase.steps if step.lane == lane and step.weights)
        for lane in (0, 1)
    ]
    assert set(weights[1]) <= set(weights[0])


def test_lanes_swap_gpu_and_cpu_every_layer() -> None:
    """With attention and experts of one length, two lanes take half of two tokens in one lane."""
    plan = _plan()
    single, dual = plan.phase("decode"), plan.phase(DUAL)

    def unit(batch: int) -> float:
        def cost(step: object) -> Cost:
            op = getattr(step, "op", "")
            resource = getattr(step, "resource", "")
            lane = 1 if batch == 1 else 2
            if op == "experts" and resource == "cpu":
                return Cost(1.0 * lane, "cpu")
            if op == "mla":
                return Cost(1.0 * lane, "gpu")
            return Cost(0.0, "none")

        phase = dual if batch == 1 else single
        return scheduled(phase, [cost(step) for step in phase.steps]).result

    routed = sum("host" in placement.tiers for placement in plan.placement)
    one_lane, two_lanes = unit(2), unit(1)
    assert one_lane >= 4 * routed
    assert two_lanes <= 0.62 * one_lane + 4


def test_the_decision_holds_the_numbers_of_both_and_the_switch_follows_them() -> None:
    plan = plan_for("deepseek-v3", ONE, 16, vram=24)
    (decision,) = [d for d in plan.decisions if d.by == "dual_batch"]
    assert "in one lane" in decision.reason and "in two" in decision.reason
    model = CostModel(plan)
    points = [s for s in plan.switches if s.kind == "decode"]
    assert points[0].phase == "decode"
    for switch in points[1:]:
        call = Call(switch.tokens, 4096, switch.tokens)
        seconds = {name: run(plan.phase(name), call, model).result for name in ("decode", DUAL)}
        other = "decode" if switch.phase == DUAL else DUAL
        assert seconds[switch.phase] <= 1.03 * seconds[other]


def test_lanes_are_not_taken_where_they_lose() -> None:
    machine = named(ONE)
    assert machine.rates is not None
    slow = Rate(value=2.5, kind="assumed", source="test")
    rates = machine.rates.model_copy(update={"overlap": slow})
    plan = compile_plan(
        CONFIGS / "deepseek-v3",
        machine=machine.model_copy(update={"rates": rates}),
        dummy_weights=True,
        layers=10,
        vram=18,
    )
    assert DUAL not in [phase.name for phase in plan.phases]
    (decision,) = [d for d in plan.decisions if d.by == "dual_batch"]
    assert decision.choice == "not taken"
    assert "batch 2" in decision.reason


def test_both_sides_are_busy_in_two_lanes() -> None:
    plan = plan_for("deepseek-v3", ONE, 16, vram=24)
    phase, model = plan.phase(DUAL), CostModel(plan)
    timeline = run(phase, Call(2, 1024, 2), model)
    single = run(plan.phase("decode"), Call(2, 1024, 2), model)
    shares = [t.busy["cpu"] / t.seconds + t.busy["gpu0"] / t.seconds for t in (timeline, single)]
    assert shares[0] > 1.2 * shares[1]
