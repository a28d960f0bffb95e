"""Whether the output matrix is screened: by what it saves, what memory there is, what was asked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hybrid_plans import ONE, plan_for

import hmc
from hmc.errors import UsageError, VerifyError
from hmc.machine.detect import load_machine
from hmc.ops.screen import compact_bytes
from hmc.plan import Decision, Plan, verify_plan
from hmc.tune.replan import replan

CONFIG = Path(__file__).resolve().parents[2] / "examples" / "configs" / "qwen3-30b-a3b-fp8"
TINY = Path(__file__).resolve().parents[1] / "models" / "tiny"
ROWS, K = 151_936, 2048


def compiled(config: str | Path = CONFIG, **options: Any) -> Plan:
    return hmc.compile(config, dummy_weights=True, layers=2, max_context=2048, **options)


def tiny(family: str, **options: Any) -> Plan:
    return hmc.compile(TINY / f"{family}.json", dummy_weights=True, max_context=128, **options)


def said(plan: Plan) -> Decision:
    (found,) = (each for each in plan.decisions if each.by == "lm_head")
    return found


def heads(plan: Plan) -> list[bool]:
    """By phase, whether its head is screened."""
    return [any("screen" in step.attrs for step in phase.steps) for phase in plan.phases]


def with_memory(size: float) -> Any:
    return load_machine("laptop").model_copy(update={"memory_bytes": int(size)})


def test_a_large_head_is_screened_in_decode_alone() -> None:
    plan, stored = compiled(), compiled(lm_head="stored")
    assert said(plan).choice == "screened" and said(stored).choice == "stored"
    assert [phase.name for phase in plan.phases] == ["prefill.host", "decode"]
    assert heads(plan) == [False, True] and heads(stored) == [False, False]
    size = compact_bytes(ROWS, K)
    assert size == ROWS * (K + K // 16 + 4)
    assert f"{size / 1e6:.1f} MB instead of {2 * ROWS * K / 1e6:.1f}" in said(plan).reason
    (item,) = (item for item in plan.ledger if item.kind == "screen")
    assert (item.device, item.bytes) == ("host", size)
    total = plan.ledger_totals["host"] - stored.ledger_totals["host"]
    assert total == size


def test_rates_decide_where_there_are_some() -> None:
    plan = compiled(machine="laptop")
    assert said(plan).choice == "screened"
    assert " ms instead of " in said(plan).reason


def test_a_small_head_is_read_as_it_is() -> None:
    plan = tiny("qwen3_moe")
    assert said(plan).choice == "stored" and "does not pay" in said(plan).reason
    assert heads(tiny("qwen3_moe", lm_head="screened")) == [False, True]


def test_memory_that_weights_and_cache_need_is_left_to_them() -> None:
    stored = compiled(lm_head="stored", cache_tokens=4096)
    needed = sum(i.bytes for i in stored.ledger if i.kind != "activations") / 0.9
    copy = compact_bytes(ROWS, K) / 0.9
    fits = compiled(cache_tokens=4096, machine=with_memory(needed + copy + 1e6))
    assert said(fits).choice == "screened"
    tight = compiled(cache_tokens=4096, machine=with_memory(needed + copy - 1e6))
    assert said(tight).choice == "stored" and "are free" in said(tight).reason
    asked = compiled(cache_tokens=4096, machine=with_memory(needed), lm_head="screened")
    assert said(asked).choice == "screened"  # as a plan that is too large, which the ledger shows


def test_columns_in_no_whole_groups_are_refused(tmp_path: Path) -> None:
    config = json.loads((CONFIG / "config.json").read_text()) | {"hidden_size": 2064}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert "no whole groups of 32" in said(compiled(tmp_path)).reason
    with pytest.raises(UsageError, match="--lm-head screened: its 2064 columns"):
        compiled(tmp_path, lm_head="screened")


@pytest.mark.parametrize(
    ("family", "why"), [("granitemoe", "arithmetic follows"), ("phimoe", "has a bias")]
)
def test_heads_that_do_more_are_read(family: str, why: str) -> None:
    assert why in said(tiny(family)).reason
    with pytest.raises(UsageError, match=f"--lm-head screened: .*{why}"):
        tiny(family, lm_head="screened")


def test_gpus_read_it_as_it_is() -> None:
    plan = plan_for("qwen3-30b-a3b-fp8", ONE, layers=2)
    assert said(plan).reason == "GPUs decode" and not any(heads(plan))
    with pytest.raises(UsageError, match="GPUs decode"):
        compiled(machine=ONE, lm_head="screened")


def test_tuning_keeps_what_was_asked() -> None:
    for how in ("stored", "screened"):
        plan = compiled(lm_head=how)
        again = replan(plan, plan.placement)
        assert heads(again) == heads(plan) and again.options.lm_head == how


def test_only_logits_are_screened() -> None:
    plan = compiled(lm_head="screened")
    decode = plan.phase("decode")
    head = next(step for step in decode.steps if "screen" in step.attrs)
    other = next(step for step in decode.steps if step.op == head.op and step is not head)
    for step, attrs in (
        (other, {**other.attrs, "screen": 32}),
        (head, {**head.attrs, "screen": 64}),
    ):
        steps = tuple(
            each.model_copy(update={"attrs": attrs}) if each is step else each
            for each in decode.steps
        )
        phases = (plan.phases[0], decode.model_copy(update={"steps": steps}))
        with pytest.raises(VerifyError):
            verify_plan(plan.model_copy(update={"phases": phases}))
