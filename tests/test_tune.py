"""`hmc tune`: what is set is in the plan, what is pinned moves in every schedule, and the search
keeps only what is measured better with the same output.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from hmc.bench.compare import Compared
from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError, MachineError, UsageError
from hmc.machine.detect import load_machine
from hmc.plan import Plan, load_plan, save_plan
from hmc.plan.diff import diff
from hmc.plan.verify import verify_plan
from hmc.predict import measured as store
from hmc.ranges import expert_ranges
from hmc.tune.measure import Runner
from hmc.tune.pins import parse_pin, place
from hmc.tune.settings import Setting, apply, current, parse_setting
from hmc.tune.trials import candidates, search, won

CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "deepseek-v3"

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen3_moe", "fp8")


@pytest.fixture(scope="module")
def plan(model: Path) -> Plan:
    return compile_plan(model, max_context=300)


@pytest.fixture(scope="module")
def hybrid() -> Plan:
    """DeepSeek-V3's shapes, six layers, on a GPU with room for a part of the experts."""
    machine = load_machine("epyc9355-rtx5090")
    gpu = machine.gpus[0].model_copy(update={"memory_bytes": 28 * 10**9})
    machine = machine.model_copy(update={"gpus": (gpu,)})
    return compile_plan(CONFIG, machine=machine, dummy_weights=True, layers=6, max_context=2048)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of `hmc tune`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["tune", *map(str, arguments)])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


# -- settings --------------------------------------------------------------------------------------


def _set(plan: Plan, *texts: str) -> Plan:
    return apply(plan, tuple(map(parse_setting, texts)))


def test_settings_change_what_they_name(plan: Plan) -> None:
    other = _set(plan, "threads=3", "linear.prefetch=4096", "linear.rows=8", "linear.streams=2")
    assert other.threads == 3
    for key, kernel in other.kernels.items():
        if kernel.op == "linear":
            assert kernel.tile == (("prefetch", 4096), ("rows", 8), ("streams", 2))
        else:
            assert kernel == plan.kernels[key]
    assert current(other, Setting("prefetch", 0, "linear")) == 4096
    assert current(plan, Setting("prefetch", 0, "linear")) is None
    verify_plan(other)


def test_a_chunk_changes_limit_phase_and_ledger(plan: Plan) -> None:
    other = _set(plan, "chunk=100")
    assert other.limits.max_chunk == other.phase("prefill.host").max_tokens == 100
    rows = diff(plan, other).ledger
    per_token = plan.phase("prefill.host").activation_bytes
    assert rows[0].delta == per_token * (100 - plan.limits.max_chunk)
    assert len([item for item in other.ledger if item.kind == "activations"]) == 2
    verify_plan(other)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("threads", "write threads=N"),
        ("threads=0", "at least 1"),
        ("threads=5000", "more than"),
        ("chunk=-1", "write threads=N"),
        ("chunk=9999", "context is 300"),
        ("ring=1", "at least 2"),
        ("ring=8", "streams no prompt"),
        ("linear.colour=2", "no such tile choice"),
        ("route.rows=2", "no such tile choice"),
        ("linear.rows=3", "not a value"),
        ("linear.rows=8", "rows x streams is 32"),
        ("gemm.tokens=99", "not a value"),
    ],
)
def test_what_cannot_be_set(plan: Plan, text: str, part: str) -> None:
    with pytest.raises(UsageError, match=part):
        _set(plan, text)


def test_a_ring_is_planned_anew(hybrid: Plan) -> None:
    found = _set(hybrid, "ring=32", "threads=3")
    rings = {phase.name: phase.ring for phase in found.phases if phase.slots}
    assert rings == {"prefill.stream": 32}
    assert hybrid.phase("prefill.stream").ring != 32
    assert (found.threads, found.placement) == (3, hybrid.placement)
    verify_plan(found)
    assert found.options.ring == 32 and found.options.threads == 3
    freed = place(found, [parse_pin("layers.3-5.experts.*=host")])  # pins keep it
    assert freed.phase("prefill.stream").ring == 32


def test_an_op_that_the_plan_lacks(plan: Plan) -> None:
    rest = {key: kernel for key, kernel in plan.kernels.items() if kernel.op != "gate_up"}
    with pytest.raises(UsageError, match="no kernel gate_up"):
        _set(plan.model_copy(update={"kernels": rest}), "gate_up.rows=2")


# -- pins ------------------------------------------------------------------------------------------


def _homes(plan: Plan, layer: int) -> dict[int, str]:
    placement = next(each for each in plan.placement if each.layer == layer)
    return {
        expert: tier for tier, text in placement.tiers.items() for expert in expert_ranges(text)
    }


def test_pins_move_experts_in_every_schedule(hybrid: Plan) -> None:
    freed = place(hybrid, [parse_pin("layers.3-5.experts.*=host")])
    assert {tier for layer in (3, 4, 5) for tier in _homes(freed, layer).values()} == {"host"}
    assert not [
        step
        for step in freed.phase("decode").steps
        if step.op == "experts" and "gpu" in step.resource
    ]
    pinned = place(freed, [parse_pin("layers.4-5.experts.0-31,77=gpu0")])
    for layer in (3, 4, 5):
        on_gpu = [expert for expert, tier in _homes(pinned, layer).items() if tier == "gpu0"]
        assert on_gpu == ([] if layer == 3 else [*range(32), 77])
    steps = [
        step
        for step in pinned.phase("decode").steps
        if step.op == "experts" and step.resource == "gpu0"
    ]
    assert [(step.layer, step.attrs["range"]) for step in steps] == [(4, "0-31,77"), (5, "0-31,77")]
    each = 3 * (7168 * 2048 + 4 * 56 * 16)
    held = sum(
        item.bytes
        for item in pinned.ledger
        if (item.device, item.kind) == ("gpu0", "routed experts")
    )
    assert held == 2 * 33 * each
    verify_plan(pinned)


def test_pins_that_change_nothing_change_nothing(hybrid: Plan) -> None:
    layer = hybrid.placement[0]
    pins = [
        parse_pin(f"layers.{layer.layer}.experts.{text}={tier}")
        for tier, text in layer.tiers.items()
    ]
    found = diff(hybrid, place(hybrid, pins))
    assert not found.placement and not found.ledger and not found.kernels
    assert not [phase for phase in found.phases if phase.added or phase.removed or phase.changed]


def _recorded(path: Path) -> Path:
    counts = {layer: [900 if expert < 40 else 20 for expert in range(256)] for layer in (3, 4, 5)}
    part = {"tokens": 1000, "counts": counts}
    path.write_text(json.dumps({"learn": part, "held_out": part}))
    return path


def test_pins_ask_for_what_the_plan_was_asked_for(tmp_path: Path) -> None:
    """A plan for a part of a GPU stays one, and keeps the routing that it was made by."""
    plan = compile_plan(
        CONFIG,
        machine="epyc9355-rtx5090",
        dummy_weights=True,
        layers=6,
        vram=12,
        max_chunk=256,
        slo="tps=1",
        routing_profile=_recorded(tmp_path / "routing.json"),
    )
    save_plan(plan, tmp_path / "a.hmp")
    plan = load_plan(tmp_path / "a.hmp")
    assert plan.options.profile is not None
    found = place(plan, [parse_pin("layers.3.experts.0=host")])
    held = sum(item.bytes for item in found.ledger if item.device == "gpu0")
    assert held <= 12e9
    assert found.options == plan.options and found.goals == plan.goals
    again = place(plan, [])
    assert sorted(map(str, again.decisions)) == sorted(map(str, plan.decisions))
    assert again.model_copy(update={"decisions": plan.decisions}) == plan
    with pytest.raises(CapacityError, match="pinned to gpu0, which has room for"):
        place(plan, [parse_pin("layers.3-4.experts.*=gpu0")])


def test_pins_keep_what_was_set(hybrid: Plan) -> None:
    tuned = _set(hybrid, "threads=5", "experts_down.prefetch=0")
    found = place(tuned, [parse_pin("layers.3.experts.0=host")])
    assert found.threads == 5
    assert current(found, Setting("prefetch", 1, "experts_down")) == 0
    assert found.limits == tuned.limits and found.kv == tuned.kv


@pytest.mark.parametrize(
    ("text", "error", "part"),
    [
        ("layers.3.experts.0", UsageError, "write layers"),
        ("layers.3-.experts.0=gpu0", UsageError, "list of ranges"),
        ("layers.5-3.experts.0=gpu0", UsageError, "is empty"),
        ("layers.0.experts.0=gpu0", UsageError, "layer 0 has no routed experts"),
        ("layers.3.experts.256=gpu0", UsageError, "experts 0 to 255"),
        ("layers.3.experts.0=gpu1", UsageError, "has no gpu1"),
        ("layers.3-5.experts.*=gpu0", CapacityError, "pinned to gpu0"),
    ],
)
def test_what_cannot_be_pinned(hybrid: Plan, text: str, error: type[Exception], part: str) -> None:
    with pytest.raises(error, match=part):
        place(hybrid, [parse_pin(text)])


# -- the search, on runners that answer what the test says -----------------------------------------


@dataclass
class _Fake:
    """A runner whose speed depends on the plan alone; `closed` counts over all of them."""

    plan: Plan
    speed: Callable[[Plan, str], float]
    answer: Callable[[Plan], int]
    closed: list[int] = field(default_factory=list)
    loads: tuple[int, int] = (300, 128)

    def greedy(self) -> list[list[int]]:
        return [[self.answer(self.plan)]]

    def rate(self, kind: str) -> float:
        return self.speed(self.plan, kind)

    def close(self) -> None:
        self.closed.append(1)


def _prefetch(plan: Plan) -> int:
    return current(plan, Setting("prefetch", 0, "linear")) or 0


def _searched(plan: Plan, speed: Any, answer: Any = lambda plan: 1, fails: Any = None) -> Any:
    closed: list[int] = []
    opened: list[int] = []

    def make(candidate: Plan) -> Any:
        if fails is not None and fails(candidate):
            raise MachineError("no such thing here")
        opened.append(1)
        return _Fake(candidate, speed, answer, closed)

    found = search(plan, make, repetitions=3)
    assert len(closed) == len(opened)
    return found


def test_the_better_is_kept_and_all_is_told(plan: Plan) -> None:
    def speed(candidate: Plan, kind: str) -> float:
        best = 1.5 if _prefetch(candidate) == 4096 else 1.02 if _prefetch(candidate) == 2048 else 1
        return 10.0 * best if kind == "decode" else 1000.0 / candidate.limits.max_chunk

    found = _searched(plan, speed)
    assert _prefetch(found.plan) == 4096
    assert found.plan.limits.max_chunk == 256
    kept = [trial.change for trial in found.trials if trial.kept]
    assert len(kept) == 2 and "prefetch=4096" in kept[0] and kept[1] == "chunk=256"
    told = [d for d in found.plan.decisions if d.by == "tune"]
    assert [d.subject for d in told] == [trial.change for trial in found.trials]
    assert {d.choice for d in told} == {"kept", "not kept"}
    winner = next(d for d in told if "prefetch=4096" in d.subject)
    assert "10.00 -> 15.00 tokens/s: +50.0%" in winner.reason
    assert {row.kind: row.tokens_per_second for row in found.measured}["decode"] == 15.0
    verify_plan(found.plan)


def test_less_than_three_percent_is_not_kept(plan: Plan) -> None:
    found = _searched(plan, lambda p, kind: 10.0 if _prefetch(p) == 0 else 10.29)
    assert not any(trial.kept for trial in found.trials)
    assert found.plan.model_copy(update={"decisions": plan.decisions}) == plan
    assert all(len(trial.ratios) == 1 for trial in found.trials)


def test_luck_is_not_kept(plan: Plan) -> None:
    """The first comparison finds 20 %, the second nothing."""
    calls = {"new": 0}

    def speed(candidate: Plan, kind: str) -> float:
        if _prefetch(candidate) != 4096:
            return 10.0
        calls["new"] += 1
        return 12.0 if calls["new"] <= 4 else 10.0

    found = _searched(plan, speed)
    assert not any(trial.kept for trial in found.trials)
    trial = next(each for each in found.trials if "prefetch=4096" in each.change)
    assert trial.ratios == (1.2, 1.0)


def test_other_output_is_not_kept(plan: Plan) -> None:
    found = _searched(
        plan,
        lambda p, kind: 10.0 + _prefetch(p),
        answer=lambda p: _prefetch(p) == 4096,
    )
    trial = next(each for each in found.trials if "prefetch=4096" in each.change)
    assert not trial.kept
    assert "greedy output differs" in trial.why
    assert any(each.kept for each in found.trials)


def test_what_cannot_run_is_told(plan: Plan) -> None:
    found = _searched(plan, lambda p, kind: 1.0, fails=lambda p: _prefetch(p) == 4096)
    trial = next(each for each in found.trials if "prefetch=4096" in each.change)
    assert trial.why == "cannot run: no such thing here"


def test_turns_won() -> None:
    assert won(Compared((3.0, 1.0, 3.0, 2.0), (2.0,) * 4, (2.0,) * 4)) == 0.5


def test_candidates_fit_the_plan(plan: Plan, hybrid: Plan) -> None:
    for each in (plan, hybrid):
        for kind, changes in candidates(each):
            assert kind in ("decode", "prefill")
            for settings in changes:
                verify_plan(apply(each, settings))


# -- on this machine -------------------------------------------------------------------------------


@pytest.mark.slow
def test_tiles_and_chunks_leave_greedy_output_alone(plan: Plan) -> None:
    with Runner(plan, prompt=40, context=20, tokens=3) as runner:
        expected = runner.greedy()
        assert runner.decode_rate() > 0 and runner.prefill_rate() > 0
        assert runner.loads == (40, 21)
    assert [len(answer) for answer in expected] == [16, 16, 16]
    other = _set(
        plan,
        *("threads=3", "chunk=33", "linear.rows=2", "linear.prefetch=0", "gemm.tokens=8"),
        *("experts_gate_up.streams=2", "experts_down.rows=1", "grouped_down.tokens=6"),
    )
    with Runner(other) as runner:
        assert runner.greedy() == expected


def test_command_by_hand(plan: Plan, hybrid: Plan, tmp_path: Path, run: Run) -> None:
    path, out_path = tmp_path / "a.hmp", tmp_path / "b.hmp"
    save_plan(plan, path)
    code, out, err = run(
        *(path, "-o", out_path, "--set", "threads=1", "--set", "linear.rows=8"),
        *("--set", "linear.streams=2"),
    )
    assert (code, err) == (0, "")
    tuned = load_plan(out_path)
    assert tuned.threads == 1
    told = [(d.subject, d.choice) for d in tuned.decisions if d.by == "tune"]
    assert told == [("threads=1", "set"), ("linear.rows=8", "set"), ("linear.streams=2", "set")]
    assert "asked for by hand" in out
    save_plan(hybrid, path)
    code, out, err = run(path, "-o", out_path, "--pin", "layers.3-5.experts.*=host", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["decisions"][-1]["choice"] == "pinned layers.3-5.experts.*=host"
    assert {tier for p in load_plan(out_path).placement for tier in p.tiers} == {"host"}


@pytest.mark.slow
def test_command_searches(
    plan: Plan, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = [
        ("decode", [(Setting("prefetch", 0, "linear"),)]),
        ("prefill", [(Setting("chunk", 20),)]),
    ]
    monkeypatch.setattr("hmc.tune.trials.candidates", lambda plan: few)
    monkeypatch.setattr("hmc.tune.measure._LEAST_SECONDS", 1e-6)
    path, out_path = tmp_path / "a.hmp", tmp_path / "b.hmp"
    save_plan(plan, path)
    arguments = ("--prompt", 40, "--context", 10, "--tokens", 2, "--repetitions", 2)
    code, out, err = run(path, "-o", out_path, *arguments, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [trial["change"] for trial in found["trials"]] == ["linear: prefetch=0", "chunk=20"]
    tuned = load_plan(out_path)
    rows = store.read(out_path, tuned)
    assert {(row.kind, row.tokens) for row in rows} == {("prefill", 40), ("decode", 11)}
    assert all(row.by == "hmc tune" for row in rows)
    assert len([d for d in tuned.decisions if d.by == "tune"]) == 2


def test_command_refuses(plan: Plan, hybrid: Plan, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "a.hmp"
    save_plan(plan, path)
    dummy = tmp_path / "dummy.hmp"
    save_plan(hybrid, dummy)
    out_path = tmp_path / "b.hmp"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((path, "--set", "colour=1"), 2, "--set colour=1"),
        ((path, "--pin", "x"), 2, "--pin x"),
        ((path, "--pin", "layers.0.experts.0=gpu0"), 2, "no gpu0"),
        ((path, "--repetitions", 0), 2, "'--repetitions': 0"),
        ((dummy,), 2, "--dummy-weights"),
        ((tmp_path / "none.hmp",), 5, "cannot read"),
    ]
    for arguments, expected, part in cases:
        code, out, err = run(*arguments, "-o", out_path)
        assert (code, out) == (expected, "")
        assert err.startswith("hmc: error: ") and err.count("\n") == 1
        assert part in err
        assert not out_path.exists()
