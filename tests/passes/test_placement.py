"""Placement: the solver against brute force and the linear bound, budgets, profiles, refusals."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hybrid_plans import CONFIGS, ONE, TWO, named, plan_for, with_memory
from hypothesis import given, settings
from hypothesis import strategies as st

from hmc.checkpoint import Checkpoint
from hmc.compiler import begin, open_checkpoint
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError, UsageError, VerifyError
from hmc.passes.place import needs
from hmc.passes.place.expert_placement import ExpertPlacement
from hmc.passes.place.solver import Item, solve
from hmc.passes.records import Budget
from hmc.plan import Plan, load_plan, save_plan
from hmc.plan.memory import stored_expert_bytes
from hmc.plan.options import Options
from hmc.plan.routing_profile import RoutingCounts, RoutingProfile
from hmc.ranges import expert_ranges

EXPERT = 3 * (7168 * 2048 + 4 * 56 * 16)
"""Bytes of a DeepSeek-V3 expert: three FP8 matrices with a float a block of 128 x 128."""


def _brute_force(things: list[Item], budgets: tuple[int, ...]) -> float:
    best = 0.0
    for homes in itertools.product(range(-1, len(budgets)), repeat=len(things)):
        used = [0] * len(budgets)
        gain = 0.0
        for item, home in zip(things, homes, strict=True):
            if home >= 0:
                used[home] += item.bytes
                gain += item.gains[home]
        if all(use <= budget for use, budget in zip(used, budgets, strict=True)):
            best = max(best, gain)
    return best


@settings(max_examples=120, deadline=None)
@given(
    st.integers(1, 9),
    st.lists(st.integers(0, 20), min_size=1, max_size=7),
    st.lists(st.tuples(st.integers(0, 25), st.integers(0, 20)), min_size=1, max_size=2),
)
def test_experts_of_one_size_are_placed_as_by_brute_force(
    size: int, chances: list[int], gpus: list[tuple[int, int]]
) -> None:
    budgets = tuple(budget for budget, _ in gpus)
    things = [
        Item(index, 0, size, tuple(float(chance * gain) for _, gain in gpus))
        for index, chance in enumerate(chances)
    ]
    result = solve(things, budgets)
    assert result.gain == pytest.approx(_brute_force(things, budgets))
    assert result.gain <= result.bound + 1e-9


@settings(max_examples=80, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.floats(0, 1)), max_size=80),
    st.lists(st.integers(0, 600), min_size=1, max_size=4),
)
def test_budgets_hold_and_every_item_has_one_home(
    values: list[tuple[int, float]], budgets: list[int]
) -> None:
    things = [Item(i, 0, size, (gain,) * len(budgets)) for i, (size, gain) in enumerate(values)]
    result = solve(things, budgets)
    assert len(result.homes) == len(things)
    for gpu, budget in enumerate(budgets):
        used = sum(
            item.bytes for item, home in zip(things, result.homes, strict=True) if home == gpu
        )
        assert used <= budget
    assert result.gain <= result.bound + 1e-9


@pytest.mark.parametrize("gigabytes", [24, 32, 80])
@pytest.mark.parametrize("skew", [0.0, 1.0])
def test_deepseek_is_within_a_percent_of_the_linear_bound(gigabytes: int, skew: float) -> None:
    budget = int((gigabytes - 17.3) * 1e9)  # beside attention, shared experts and norms
    chances = [(1 + expert) ** -skew for expert in range(256)]
    scale = 8 / sum(chances)
    things = [
        Item(layer, expert, EXPERT, (40e-6 * chances[expert] * scale,))
        for layer in range(58)
        for expert in range(256)
    ]
    result = solve(things, (budget,))
    whole, part = divmod(budget, EXPERT)
    gains = sorted((item.gains[0] for item in things), reverse=True)
    bound = sum(gains[:whole]) + (gains[whole] * part / EXPERT if whole < len(gains) else 0.0)
    assert result.bound == pytest.approx(bound)
    assert 0.99 * bound <= result.gain <= bound * (1 + 1e-9)


@pytest.mark.few(3)
@pytest.mark.parametrize("machine", [ONE, TWO])
@pytest.mark.parametrize("gigabytes", [16, 24, 32, 80, 200])
def test_no_device_holds_more_than_its_memory(machine: str, gigabytes: int) -> None:
    target = with_memory(named(machine), gigabytes * 10**9)
    plan = compile_plan(CONFIGS / "deepseek-v3", machine=target, dummy_weights=True, layers=8)
    totals: dict[str, int] = {}
    for item in plan.ledger:
        totals[item.device] = totals.get(item.device, 0) + item.bytes
    for device, total in totals.items():
        assert total <= target.memory_of(device), device
    for placement in plan.placement:
        everyone = sorted(e for text in placement.tiers.values() for e in expert_ranges(text))
        assert everyone == list(range(256))
    if gigabytes == 200:
        assert {tier for p in plan.placement for tier in p.tiers} == {"gpu0"}
        assert not plan.switches  # nothing to stream, nothing to swap with


def test_resident_experts_fill_layers_one_after_another() -> None:
    plan = plan_for("deepseek-v3", TWO)
    mixed = [p.layer for p in plan.placement if len(p.tiers) > 1]
    assert len(mixed) <= 2
    assert any("host" not in p.tiers for p in plan.placement)


def test_a_plan_without_gpu_has_two_phases_on_the_cpu() -> None:
    plan = plan_for("deepseek-v3", "laptop")
    assert [phase.name for phase in plan.phases] == ["prefill.host", "decode"]
    assert {step.resource for phase in plan.phases for step in phase.steps} == {"cpu"}
    assert not any(step.waits or step.signal >= 0 for p in plan.phases for step in p.steps)
    assert not plan.switches
    assert {item.device for item in plan.ledger} == {"host"}


def test_gpus_without_rates_are_left_alone_with_a_reason() -> None:
    machine = named(ONE)
    gpus = tuple(gpu.model_copy(update={"rates": None}) for gpu in machine.gpus)
    target = machine.model_copy(update={"gpus": gpus})
    plan = compile_plan(CONFIGS / "deepseek-v3", machine=target, dummy_weights=True, layers=4)
    assert len(plan.phases) == 2
    (why,) = [d.reason for d in plan.decisions if d.subject == "GPUs"]
    assert "without rates" in why


def test_a_gpu_too_small_for_attention_is_left_alone_with_a_reason() -> None:
    target = with_memory(named(ONE), 2 * 10**9)
    plan = compile_plan(CONFIGS / "deepseek-v3", machine=target, dummy_weights=True, layers=8)
    assert {step.resource for phase in plan.phases for step in phase.steps} == {"cpu"}
    (why,) = [d.reason for d in plan.decisions if d.subject == "GPUs"]
    assert "attention, shared experts and norms take" in why


UNREAD = "gptq-order: kernels of GPUs read no plane of order"
IN_ORDER = {"+:.*self_attn.*": {"desc_act": False}}
"""All but the experts."""


def _ordered(folder: Path, rules: dict[str, Any]) -> Plan:
    """Qwen3 as GPTQ stores it whose columns have an order, but for the `rules`."""
    section = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": True,
               "lm_head": False, "dynamic": {"-:.*mlp.gate$": {}, **rules}}  # fmt: skip
    values = json.loads((CONFIGS / "qwen3-30b-a3b-int4" / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | {"quantization_config": section}))
    return compile_plan(folder, machine=named(ONE), dummy_weights=True, layers=2, vram=2.5)


def test_what_kernels_of_gpus_cannot_read_stays_on_the_host(tmp_path: Path) -> None:
    plan = _ordered(tmp_path, {})
    assert {step.resource for phase in plan.phases for step in phase.steps} == {"cpu"}
    assert [d.reason for d in plan.decisions if d.subject == "GPUs"] == [UNREAD]
    plan = _ordered(tmp_path, IN_ORDER)
    assert {each.resource for each in plan.phase("decode").steps if each.op == "experts"} == {"cpu"}
    assert any(each.resource == "gpu0" for each in plan.phase("decode").steps)
    assert not any(phase.name.startswith("prefill.stream") for phase in plan.phases)
    assert [d.reason for d in plan.decisions if d.subject == "experts on GPUs"] == [UNREAD]
    given = tuple(each.model_copy(update={"tiers": {"gpu0": "0-127"}}) for each in plan.placement)
    options = Options(dummy_weights=True, layers=2, vram=2_500_000_000)
    base = begin(open_checkpoint(tmp_path, options), named(ONE), options)
    with pytest.raises(CapacityError, match=f"nothing can be pinned to gpu0: {UNREAD}"):
        ExpertPlacement(given=given).run(base.plan, base)


def test_verification_refuses_it_on_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "unread", lambda *about: "")
    for rules, op in ({}, "linear"), (IN_ORDER, "experts"):
        with pytest.raises(VerifyError, match=rf"\({op}\): {UNREAD}"):
            _ordered(tmp_path, rules)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"max_context": 163_840, "vram": 12},
            r"memory of gpu0 binds: .*163840 tokens.*what would lift it: a larger --vram or"
            r" --max-context \d+ or a GPU with \d+ GB",
        ),
        ({"concurrency": 64}, r"memory of gpu0 binds: .*64 x 32768.*--concurrency \d+"),
        ({"slo": "ttft=2s@32k"}, r"ttft 2 s at 32768 tokens is out of reach.*binds.*a prompt of"),
        (
            {"slo": "tps=500"},
            r"500 tokens/s at context 1024.*binds \(decode\); what would lift it: \w",
        ),
    ],
)
def test_infeasible_goals_name_the_limit_and_the_way_out(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(CapacityError, match=message):
        compile_plan(
            CONFIGS / "deepseek-v3",
            machine=ONE,
            dummy_weights=True,
            layers=24 if "slo" not in options else 8,
            **options,
        )


def test_goals_that_are_met_stand_in_the_plan() -> None:
    plan = plan_for("deepseek-v3", ONE, slo="ttft=30s@32k,tps=20")  # type: ignore[arg-type]
    assert plan.goals.ttft_prompt == 32_768
    assert plan.goals.tokens_per_second == 20


def _counts(hot: range, layers: range) -> RoutingCounts:
    return RoutingCounts(
        tokens=1000,
        counts={
            layer: tuple(900 if e in hot else 900 * 3 // 8 for e in range(16)) for layer in layers
        },
    )


@pytest.mark.parametrize(
    ("held_out", "choice"), [(range(4), "pinned"), (range(4, 8), "not pinned")]
)
def test_pins_are_made_where_the_held_out_part_agrees(
    held_out: range,
    choice: str,
    checkpoint: Callable[..., Path],
) -> None:
    base = begin(Checkpoint.open(checkpoint("deepseek_v3", "fp8")), named(ONE), Options())
    layers = [each.layer for each in base.plan.placement]
    span = range(min(layers), max(layers) + 1)
    assert base.plan.model.experts == 16
    profile = RoutingProfile(learn=_counts(range(4), span), held_out=_counts(held_out, span))
    room = 4 * sum(stored_expert_bytes(base.plan).values())  # for four experts of each layer
    budget = Budget((1 << 30,), 0, 0, 0, 0, (room,), 1024, 1024, 1024)
    plan = ExpertPlacement(profile).run(base.plan, replace(base, budget=budget))
    hot = {p.tiers["gpu0"] for p in plan.placement if "gpu0" in p.tiers}
    assert (hot == {"0-3"}) is (choice == "pinned")
    (decision,) = [d for d in plan.decisions if "routing profile" in d.subject]
    assert decision.choice.startswith(choice)
    assert "held-out" in decision.reason and "learned" in decision.reason


def test_a_profile_of_another_model_is_refused(tmp_path: Path) -> None:
    part = {"tokens": 10, "counts": {"3": [1] * 16}}
    path = tmp_path / "routing.json"
    path.write_text(json.dumps({"learn": part, "held_out": part}))
    with pytest.raises(UsageError, match="layer 3 has 16 counts, the model 256 experts"):
        compile_plan(
            CONFIGS / "deepseek-v3",
            machine=ONE,
            dummy_weights=True,
            layers=5,
            routing_profile=path,
        )


def test_hybrid_plans_are_deterministic(tmp_path: Path) -> None:
    one = plan_for("deepseek-v3", TWO)
    two: Plan = compile_plan(CONFIGS / "deepseek-v3", machine=TWO, dummy_weights=True, layers=6)
    save_plan(one, tmp_path / "a.hmp")
    save_plan(two, tmp_path / "b.hmp")
    assert (tmp_path / "a.hmp").read_bytes() == (tmp_path / "b.hmp").read_bytes()
    assert load_plan(tmp_path / "a.hmp") == one
