"""Streamed prefill: order, events, the ring, ranks, timelines, and plans broken on purpose."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable

import pytest
from hybrid_plans import (
    CONFIGS,
    ONE,
    TWO,
    named,
    plan_for,
    waits_of,
    with_memory,
    with_phase,
    with_rate,
    without_wait,
)

from hmc.compiler import compile as compile_plan
from hmc.errors import VerifyError
from hmc.plan import Phase, Plan, Step
from hmc.plan.order import check_order
from hmc.plan.verify import verify_plan
from hmc.predict.cost import Call, Cost, CostModel
from hmc.predict.run import run_prefill
from hmc.predict.timeline import run, scheduled
from hmc.ranges import expert_ranges

STREAM = "prefill.stream"


def _plan(machine: str) -> Plan:
    """Five routed layers of 11.3 GB each, more than the GPUs hold."""
    return plan_for("deepseek-v3", machine, 8, vram=24)


def _streamed(phase: Phase, layer: int) -> Counter[int]:
    return Counter(
        expert
        for step in phase.steps
        if step.op == "load" and step.layer == layer and "range" in step.attrs
        for expert in expert_ranges(str(step.attrs["range"]))
    )


@pytest.mark.few(2)
@pytest.mark.parametrize("machine", [ONE, TWO])
@pytest.mark.parametrize("model", ["deepseek-v3", "qwen3-30b-a3b", "kimi-k2", "mixtral-8x7b"])
def test_every_host_expert_is_streamed_once_and_residents_never(model: str, machine: str) -> None:
    target = with_memory(named(machine), 20 * 10**9)
    plan = compile_plan(
        CONFIGS / model, machine=target, dummy_weights=True, layers=24 if "mixtral" in model else 6
    )
    if not any(phase.name == STREAM for phase in plan.phases):
        assert all("host" not in placement.tiers for placement in plan.placement)
        return
    phase = plan.phase(STREAM)
    for placement in plan.placement:
        host = expert_ranges(placement.tiers.get("host", ""))
        assert _streamed(phase, placement.layer) == Counter(host)
        computed = Counter(
            expert
            for step in phase.steps
            if step.op == "experts" and step.layer == placement.layer
            for expert in expert_ranges(str(step.attrs["range"]))
        )
        assert computed == Counter(range(plan.model.experts))


def test_resources_are_those_of_the_ranks() -> None:
    one = {step.resource for step in _plan(ONE).phase(STREAM).steps}
    two = {step.resource for step in _plan(TWO).phase(STREAM).steps}
    assert one == {"cpu", "gpu0", "h2d0", "d2h0"}
    assert two == {"cpu", "gpu0", "gpu1", "h2d0", "h2d1", "d2h0", "link"}


@pytest.mark.few(1)
@pytest.mark.parametrize("machine", [ONE, TWO])
def test_a_dropped_event_is_always_caught(machine: str) -> None:
    plan = _plan(machine)
    phase = plan.phase(STREAM)
    dropped = random.Random(0).sample(waits_of(phase), 40)
    for at, event in dropped:
        broken = with_phase(
            plan, STREAM, lambda each, at=at, event=event: without_wait(each, at, event)
        )
        with pytest.raises(VerifyError, match=r"phase prefill\.stream, step"):
            verify_plan(broken)


def _changed(plan: Plan, pick: Callable[[Step], bool], **update: object) -> Plan:
    phase = plan.phase(STREAM)
    at = next(i for i, step in enumerate(phase.steps) if pick(step))
    steps = list(phase.steps)
    steps[at] = steps[at].model_copy(update=update)
    return with_phase(plan, STREAM, lambda each: each.model_copy(update={"steps": tuple(steps)}))


def test_verify_catches_wrong_slots() -> None:
    plan = _plan(ONE)
    ranged = lambda step: step.op == "experts" and bool(step.uses)  # noqa: E731
    with pytest.raises(VerifyError, match="slot nowhere is not declared"):
        verify_plan(_changed(plan, ranged, uses=("nowhere",)))
    with pytest.raises(VerifyError, match="before anything filled it"):
        verify_plan(_changed(plan, ranged, uses=("ring0.7",)))
    step = next(step for step in plan.phase(STREAM).steps if ranged(step))
    with pytest.raises(VerifyError, match="its slots do not hold layer:3"):
        check_order(_changed(plan, ranged, attrs={**step.attrs, "range": "1-2"}).phase(STREAM))

    def smaller(phase: Phase) -> Phase:
        slots = tuple(each.model_copy(update={"bytes": each.bytes - 1}) for each in phase.slots)
        return phase.model_copy(update={"slots": slots})

    with pytest.raises(VerifyError, match="its slots are too small"):
        verify_plan(with_phase(plan, STREAM, smaller))


@pytest.mark.parametrize(("model", "gigabytes"), [("deepseek-v3", 11.28), ("kimi-k2", 16.92)])
def test_the_ring_holds_one_layer_where_memory_allows(model: str, gigabytes: float) -> None:
    plan = plan_for(model, ONE)
    phase = plan.phase(STREAM)
    assert phase.ring == plan.model.experts
    slots = [slot for slot in phase.slots if slot.name.startswith("ring")]
    assert sum(slot.bytes for slot in slots) / 1e9 == pytest.approx(gigabytes, rel=0.005)


def test_the_ring_shrinks_with_memory_and_the_plan_stays_sound() -> None:
    rings = []
    for gigabytes in (34, 20, 14, 11):
        target = with_memory(named(ONE), gigabytes * 10**9)
        plan = compile_plan(
            CONFIGS / "deepseek-v3",
            machine=target,
            dummy_weights=True,
            layers=8,
            max_context=24_576,
        )
        rings.append(plan.phase(STREAM).ring)
        verify_plan(plan)
    assert rings == sorted(rings, reverse=True)
    assert rings[0] == 256
    assert 2 <= rings[-1] < 256


def test_shorter_prompts_have_a_longer_ring() -> None:
    plan = plan_for("deepseek-v3", ONE, 6, vram=14, max_context=98_304)
    base = plan.phase(STREAM)
    (longer,) = (
        phase
        for phase in plan.phases
        if phase.name.startswith(f"{STREAM}.") and phase.name.rpartition(".")[2].isdigit()
    )
    assert base.ring < longer.ring <= 256
    assert longer.max_tokens < base.max_tokens
    assert longer.name == f"{STREAM}.{longer.max_tokens}"
    model, tokens = CostModel(plan), 16_384
    with_longer = run_prefill(plan, model, tokens, longer.name).seconds
    assert 1.03 * with_longer <= run_prefill(plan, model, tokens, STREAM).seconds
    points = [(s.phase, s.tokens) for s in plan.switches if s.kind == "prefill"]
    assert [name for name, _ in points] == ["prefill.host", longer.name, STREAM]
    assert points[2][1] == longer.max_tokens + 1
    assert run_prefill(plan, model, tokens).phase == longer.name
    (reason,) = [d.reason for d in plan.decisions if d.subject == f"ring of {longer.name}"]
    assert "16384 tokens take" in reason


def test_a_ring_that_was_asked_for_is_the_only_one() -> None:
    plan = plan_for("deepseek-v3", ONE, 6, vram=14, max_context=98_304, ring=16)
    streams = [phase for phase in plan.phases if phase.name.startswith(STREAM)]
    assert [(phase.name, phase.ring) for phase in streams] == [(STREAM, 16)]


def test_chosen_experts_alone_are_loaded_where_that_pays() -> None:
    machine = with_rate(named(ONE), dot=2e11, prefill=1e-6)
    plan = compile_plan(
        CONFIGS / "deepseek-v3", machine=machine, dummy_weights=True, layers=6, vram=24
    )
    name = f"{STREAM}.chosen"
    phase, model = plan.phase(name), CostModel(plan)
    starts = {s.phase: s.tokens for s in plan.switches if s.kind == "prefill"}
    assert list(starts) == ["prefill.host", name, STREAM]
    assert starts[STREAM] == phase.max_tokens + 1
    for step in phase.steps:
        if step.op == "load" and "range" in step.attrs:
            assert step.inputs["order"].width == 8
            few = model.step(phase, step, Call(8)).bytes["pcie"]
            assert 0.15 * step.weight_bytes < few < 0.3 * step.weight_bytes  # 1 - (31/32)^8
    tokens = starts[name] + 8
    mine = run_prefill(plan, model, tokens, name).seconds
    assert mine < run_prefill(plan, model, tokens, "prefill.host").seconds
    assert mine < run_prefill(plan, model, tokens, STREAM).seconds
    waits = [
        (at, event)
        for at, event in waits_of(phase)
        if phase.steps[at].op == "load" and phase.steps[at].inputs
    ]
    at, event = waits[0]  # the router's word, which the load needs
    with pytest.raises(VerifyError, match=r"phase prefill\.stream\.chosen, step"):
        verify_plan(with_phase(plan, name, lambda each: without_wait(each, at, event)))


def test_nothing_is_loaded_by_choice_on_the_test_bed() -> None:
    plan = _plan(ONE)
    assert not [phase for phase in plan.phases if phase.name.endswith(".chosen")]
    (why,) = [d.reason for d in plan.decisions if d.subject == "loading chosen experts alone"]
    assert "choose 100.0% of a layer's experts" in why


@pytest.mark.parametrize(("load", "compute"), [(1.0, 0.02), (0.5, 0.5), (0.02, 1.0)])
def test_the_timeline_is_the_larger_of_transfer_and_computation(
    load: float, compute: float
) -> None:
    """On a null device: `load` seconds a GB loaded, `compute` seconds a GB used, nothing else. The
    fill is the first loads, before anything can be computed, and the use after the last load."""
    phase = plan_for("deepseek-v3", ONE, 12).phase(STREAM)
    expert = 44_050_944 / 1e9

    def cost(step: Step) -> Cost:
        if step.op == "load":
            return Cost(load * step.weight_bytes / 1e9, "h2d")
        if step.op == "experts":
            return Cost(compute * expert * int(step.attrs["count"]), "gpu")
        return Cost(0.0, "none")

    timeline = scheduled(phase, [cost(step) for step in phase.steps])
    transfer = sum(
        cost(step).seconds for step in phase.steps if step.op == "load" and "what" not in step.attrs
    )
    computing = sum(cost(step).seconds for step in phase.steps if step.op == "experts")
    # fill: dense layers and the first group before any expert; drain: the last group
    first = next(i for i, step in enumerate(phase.steps) if step.op == "experts" and step.uses)
    fill = sum(cost(s).seconds for s in phase.steps[:first] if s.op == "load")
    bound = max(transfer + compute * expert * 32, computing + fill)
    result = timeline.result
    assert result >= max(transfer, computing)
    assert result <= 1.02 * bound


def test_timeline_of_a_small_phase_is_the_golden_one(golden: Callable[[str, str], None]) -> None:
    plan = plan_for("qwen3-30b-a3b", TWO, 2, vram=2.2, max_context=4096)
    phase = plan.phase(STREAM)
    costs = [Cost(2.0 if step.op == "load" else 1.0, "unit") for step in phase.steps]
    timeline = scheduled(phase, costs)
    lines = [
        f"{start:4.0f} {end:4.0f} {step.resource:5} {step.op}@{step.layer}"
        f" {step.attrs.get('range', '')} fills={','.join(step.fills)} uses={','.join(step.uses)}"
        f" waits={','.join(map(str, step.waits))} signal={step.signal}"
        for step, start, end in zip(phase.steps, timeline.start, timeline.finish, strict=True)
    ]
    golden("passes/stream.txt", "\n".join(lines) + "\n")


def test_two_ranks_halve_what_each_loads_and_exchange_little() -> None:
    one, two = (plan_for("deepseek-v3", name, 8, vram=26) for name in (ONE, TWO))

    def loaded(plan: Plan, resource: str) -> int:
        return sum(
            step.weight_bytes
            for step in plan.phase(STREAM).steps
            if step.op == "load" and step.resource == resource and "range" in step.attrs
        )

    host = sum(
        item.bytes for item in two.ledger if (item.device, item.kind) == ("host", "routed experts")
    )
    assert loaded(two, "h2d0") + loaded(two, "h2d1") == host
    assert abs(loaded(two, "h2d0") - loaded(two, "h2d1")) <= 0.01 * host
    assert loaded(two, "h2d0") < 0.6 * loaded(one, "h2d0")
    phase, model = two.phase(STREAM), CostModel(two)
    call = Call(8192)
    around = [
        model.step(phase, step, call).bytes["link"]
        for step in phase.steps
        if step.layer == 5 and step.resource == "link" and int(step.attrs["bytes"]) == 2 * 7168
    ]
    dispatched = 4096 * 8 * 2 * 7168 / 2  # each token's rows to the experts of the other rank
    assert len(around) == 2  # one gather, one exchange
    assert sum(around) <= 0.5 * (2 * dispatched)


def test_latents_travel_compressed() -> None:
    phase = _plan(TWO).phase(STREAM)
    sent = sum(
        int(step.attrs["bytes"])
        for step in phase.steps
        if step.resource == "link" and step.layer == 1
    )
    assert sent == 1152  # bytes a token: latent 512 and rope part 64 in bf16


@pytest.mark.parametrize("machine", [ONE, TWO])
def test_the_switch_over_is_where_the_curves_cross(machine: str) -> None:
    plan = plan_for("deepseek-v3", machine, 8, vram=24)
    point = next(s.tokens for s in plan.switches if s.phase == STREAM)
    model = CostModel(plan)
    for tokens, faster in ((point + 256, True), (max(64, point - 256), False)):
        streamed = run_prefill(plan, model, tokens, STREAM).seconds
        hosted = run_prefill(plan, model, tokens, "prefill.host").seconds
        assert (streamed < hosted) is faster
    (why,) = [d.reason for d in plan.decisions if d.subject == "switch-over"]
    assert "streaming takes" in why and "at twice the length" in why


def test_a_slow_link_leaves_every_prompt_on_the_host() -> None:
    machine = named(ONE)
    (gpu,) = machine.gpus
    assert gpu.rates is not None
    slow = gpu.rates.model_copy(update={"h2d": gpu.rates.h2d.model_copy(update={"value": 1e8})})
    target = machine.model_copy(update={"gpus": (gpu.model_copy(update={"rates": slow}),)})
    plan = compile_plan(CONFIGS / "deepseek-v3", machine=target, dummy_weights=True, layers=6)
    assert not [s for s in plan.switches if s.kind == "prefill"]
    assert [d for d in plan.decisions if d.choice == "prefill.host for every prompt"]


def test_without_a_link_rate_one_gpu_streams() -> None:
    machine = named(TWO)
    assert machine.rates is not None
    target = machine.model_copy(update={"rates": machine.rates.model_copy(update={"link": None})})
    plan = compile_plan(
        CONFIGS / "deepseek-v3", machine=target, dummy_weights=True, layers=8, vram=24
    )
    assert plan.phase(STREAM).ranks == 1


def test_a_faster_host_moves_the_switch_over_up() -> None:
    points = []
    for speed in (5e12, 2e13):
        plan = compile_plan(
            CONFIGS / "deepseek-v3",
            machine=with_memory(with_rate(named(ONE), dot=speed), 24 * 10**9),
            dummy_weights=True,
            layers=8,
        )
        points.append(next(s.tokens for s in plan.switches if s.phase == STREAM))
    assert points[0] < points[1]


def test_streaming_time_follows_the_roofline() -> None:
    plan = plan_for("deepseek-v3", ONE, 8, vram=26)
    phase, model = plan.phase(STREAM), CostModel(plan)
    moved = sum(s.weight_bytes for s in phase.steps if s.op == "load" and "what" not in s.attrs)
    short = run(phase, Call(1024), model).result
    assert moved / 5.0e10 <= short <= 1.05 * moved / 5.0e10
