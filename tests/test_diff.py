"""`hmc diff`: equal plans are equal, every change of a plan shows, and says what it is."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.machine.detect import load_machine
from hmc.plan import Decision, Goals, LayerPlacement, LedgerItem, Plan, Switch, save_plan
from hmc.plan.diff import SECTIONS, diff

CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "deepseek-v3"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def plan() -> Plan:
    return compile_plan(CONFIG, machine="laptop", dummy_weights=True, layers=5, max_context=1000)


@pytest.fixture(scope="module")
def hybrid() -> Plan:
    machine = load_machine("epyc9355-rtx5090")
    gpu = machine.gpus[0].model_copy(update={"memory_bytes": 22 * 10**9})
    machine = machine.model_copy(update={"gpus": (gpu,)})
    return compile_plan(CONFIG, machine=machine, dummy_weights=True, layers=5, max_context=1000)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of `hmc diff`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["diff", *map(str, arguments)])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


def test_equal_plans_are_equal(plan: Plan, hybrid: Plan) -> None:
    for each in (plan, hybrid):
        assert diff(each, each.model_copy(deep=True)).equal


def _altered(plan: Plan, field: str) -> Plan:
    """The plan with the last entry of one field gone, or its value another."""
    value = getattr(plan, field)
    other: Any
    if isinstance(value, str):
        other = value + "x"
    elif isinstance(value, int):
        other = value + 1
    elif field == "switches":
        other = (*value, Switch(kind="decode", phase="decode.dual", tokens=3))
    elif isinstance(value, tuple):
        other = value[:-1]
    elif isinstance(value, dict):
        other = dict(list(value.items())[:-1])
    elif isinstance(value, Goals):
        other = Goals(tokens_per_second=5.0)
    else:
        texts_and_numbers = ((name, old) for name, old in value if isinstance(old, (str, int)))
        name, old = next(texts_and_numbers)
        other = value.model_copy(update={name: old + "x" if isinstance(old, str) else old + 1})
    return plan.model_copy(update={field: other})


@pytest.mark.parametrize("field", sorted(Plan.model_fields))
def test_a_change_of_any_field_shows(hybrid: Plan, field: str) -> None:
    other = _altered(hybrid, field)
    assert other != hybrid
    found = diff(hybrid, other)
    assert not found.equal
    section = "weights" if field == "experts" else field if field in SECTIONS else "facts"
    assert getattr(found, section)
    untouched = {"facts", "placement", "ledger", "kernels", "phases", "weights", "decisions"}
    assert not any(getattr(found, name) for name in untouched - {section})


@pytest.mark.parametrize("field", ["weights", "ledger", "decisions", "phases", "placement"])
def test_another_order_is_a_difference(hybrid: Plan, field: str) -> None:
    entries = getattr(hybrid, field)
    found = diff(hybrid, hybrid.model_copy(update={field: entries[::-1]}))
    assert [change.what for change in found.facts] == [f"{field}: order or numbering"]


def test_facts_by_path(plan: Plan) -> None:
    limits = plan.limits.model_copy(update={"max_batch": 4})
    rates = plan.machine.rates
    assert rates is not None
    slower = rates.model_copy(update={"dot": rates.dot.model_copy(update={"value": 1e9})})
    machine = plan.machine.model_copy(update={"rates": slower, "flags": plan.machine.flags[1:]})
    name, table = next(iter(plan.constants.items()))
    table = (*table[:-1], 7.0)
    found = diff(
        plan,
        plan.model_copy(
            update={
                "limits": limits,
                "machine": machine,
                "constants": plan.constants | {name: table},
            }
        ),
    )
    changes = {change.what: (change.before, change.after) for change in found.facts}
    assert changes["limits.max_batch"] == ("16", "4")
    assert changes["machine.flags[0]"] == (plan.machine.flags[0], plan.machine.flags[1])
    assert changes["machine.rates.dot"][1].startswith("1e+09, assumed")
    assert changes[f"constants.{name}[{len(table) - 1}]"][1] == "7"
    assert len(changes) == 4


def test_moved_experts_are_grouped_by_layers(plan: Plan) -> None:
    def move(placement: LayerPlacement) -> LayerPlacement:
        return placement.model_copy(update={"tiers": {"gpu0": "0-31,77", "host": "32-76,78-255"}})

    moved = plan.model_copy(update={"placement": tuple(move(each) for each in plan.placement)})
    (one,) = diff(plan, moved).placement
    assert (one.layers, one.before, one.after, one.experts) == ("3-4", "host", "gpu0", "0-31,77")
    each = 3 * (7168 * 2048 + 4 * 56 * 16)
    assert (one.count, one.bytes) == (66, 66 * each)
    split = moved.model_copy(update={"placement": (moved.placement[0], plan.placement[1])})
    assert [change.layers for change in diff(plan, split).placement] == ["3"]


def test_ledger_has_deltas_and_totals(plan: Plan) -> None:
    extra = LedgerItem(device="gpu0", kind="ring", bytes=10**9, detail="32 experts")
    grown = plan.ledger[0].model_copy(update={"bytes": plan.ledger[0].bytes + 5})
    other = plan.model_copy(update={"ledger": (grown, *plan.ledger[1:], extra)})
    rows = [(each.device, each.kind, each.delta) for each in diff(plan, other).ledger]
    assert rows == [
        ("host", plan.ledger[0].kind, 5),
        ("host", "total", 5),
        ("gpu0", "ring", 10**9),
        ("gpu0", "total", 10**9),
    ]
    words = plan.ledger[0].model_copy(update={"detail": "other words"})
    (row,) = diff(plan, plan.model_copy(update={"ledger": (words, *plan.ledger[1:])})).ledger
    assert (row.delta, row.detail) == (0, "weights -> other words")


def test_kernels_name_what_changed(plan: Plan) -> None:
    name, kernel = next(iter(plan.kernels.items()))
    tiled = replace(kernel, tile=(("prefetch", 4096),))
    rest = {key: value for key, value in plan.kernels.items() if key != name}
    (change,) = diff(plan, plan.model_copy(update={"kernels": rest | {name: tiled}})).kernels
    assert (change.name, change.status) == (name, "changed")
    assert "prefetch" in change.detail
    (change,) = diff(plan, plan.model_copy(update={"kernels": rest})).kernels
    assert change.status == "removed"


def test_an_inserted_step_is_one_added_step(plan: Plan) -> None:
    decode = plan.phase("decode")
    steps = list(decode.steps)
    again = steps[3].model_copy(update={"layer": 99})
    renumbered = [
        step.model_copy(update={"id": number})
        for number, step in enumerate([*steps[:3], again, *steps[3:]])
    ]
    other = decode.model_copy(update={"steps": tuple(renumbered)})
    phases = tuple(other if phase is decode else phase for phase in plan.phases)
    (change,) = diff(plan, plan.model_copy(update={"phases": phases})).phases
    assert (change.phase, change.status) == ("decode", "changed")
    assert change.added == {again.op: 1}
    assert not (change.removed or change.changed or change.facts)
    assert change.steps_after == change.steps_before + 1


def test_another_resource_changes_a_step(plan: Plan) -> None:
    decode = plan.phase("decode")
    steps = list(decode.steps)
    steps[5] = steps[5].model_copy(update={"resource": "gpu0", "signal": 4})
    steps[6] = steps[6].model_copy(update={"waits": (4,)})
    other = decode.model_copy(update={"steps": tuple(steps)})
    phases = tuple(other if phase is decode else phase for phase in plan.phases)
    (change,) = diff(plan, plan.model_copy(update={"phases": phases})).phases
    assert sum(change.changed.values()) == 2
    assert change.fields == {"resource": 1, "waits": 1}


def test_two_machines(plan: Plan, hybrid: Plan) -> None:
    found = diff(plan, hybrid)
    assert {phase.phase: phase.status for phase in found.phases}["prefill.host"] == "changed"
    assert {phase.status for phase in found.phases} == {"changed", "added"}
    assert {change.after for change in found.placement} >= {"gpu0"}
    text = json.dumps(found.as_json())
    assert json.loads(text)["equal"] is False


def test_decisions(plan: Plan) -> None:
    first, *rest = plan.decisions
    other = first.model_copy(update={"choice": "another", "reason": "better"})
    new = Decision(by="tune", subject="threads", choice="8", reason="faster")
    found = diff(plan, plan.model_copy(update={"decisions": (other, *rest, new)})).decisions
    assert [(d.status, d.after, d.reason) for d in found] == [
        ("changed", "another", "better"),
        ("added", "8", "faster"),
    ]
    assert found[0].before == first.choice


# -- the command -----------------------------------------------------------------------------------


def test_command_says_what_differs_and_exits_like_diff(
    plan: Plan, hybrid: Plan, tmp_path: Path, run: Run
) -> None:
    one, two = tmp_path / "a.hmp", tmp_path / "b.hmp"
    save_plan(plan, one)
    save_plan(hybrid, two)
    assert run(one, one)[:2] == (0, "the plans are equal\n")
    code, out, err = run(one, two)
    assert (code, err) == (1, "")
    for part in ("Facts", "Placement", "Memory", "Phases", "Predictions", "Decisions", "gpu0"):
        assert part in out
    code, out, _ = run(one, two, "--json")
    found = json.loads(out)
    assert (code, found["equal"]) == (1, False)
    decode = [row for row in found["predictions"] if row["what"] == "decode at context 128"]
    assert decode[0]["after"] > decode[0]["before"] > 0
    assert json.loads(run(one, one, "--json")[1])["equal"] is True


def test_no_rates_no_predictions_but_a_reason(plan: Plan, tmp_path: Path, run: Run) -> None:
    one, two = tmp_path / "a.hmp", tmp_path / "b.hmp"
    machine = plan.machine.model_copy(update={"rates": None})
    save_plan(plan, one)
    save_plan(plan.model_copy(update={"machine": machine}), two)
    code, out, _ = run(one, two, "--json")
    assert code == 1
    for row in json.loads(out)["predictions"]:
        assert row["before"] > 0
        assert row["after"] is None
        assert "declares no rates" in row["reason"]
    assert run(one, two)[0] == 1


def test_bad_files_exit_with_5(plan: Plan, tmp_path: Path, run: Run) -> None:
    save_plan(plan, tmp_path / "a.hmp")
    (tmp_path / "bad.hmp").write_bytes(b"no plan")
    for name in ("bad.hmp", "none.hmp"):
        code, out, err = run(tmp_path / "a.hmp", tmp_path / name)
        assert (code, out) == (5, "")
        assert err.startswith("hmc: error: ") and err.count("\n") == 1


def test_diff_loads_neither_torch_nor_numpy(plan: Plan, hybrid: Plan, tmp_path: Path) -> None:
    save_plan(plan, tmp_path / "a.hmp")
    save_plan(hybrid, tmp_path / "b.hmp")
    check = (
        "import sys\nfrom hmc.cli import main\n"
        "try: main(['diff', *sys.argv[1:], '--json'])\n"
        "except SystemExit: sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    command = [sys.executable, "-c", check, str(tmp_path / "a.hmp"), str(tmp_path / "b.hmp")]
    assert subprocess.run(command, check=False, capture_output=True).returncode == 0
