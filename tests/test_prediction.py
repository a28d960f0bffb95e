"""Predicted against measured: whose rates are used, what is printed and stored, and that the parts
add up; how far predictions are off is not judged here."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_bench import _CONFIG

from hmc.bench.model import total_bytes
from hmc.bench.predict import cut_to_fit
from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError, MachineError
from hmc.machine.detect import detect, machine_here
from hmc.machine.model import CpuRates, GemvRate, Machine, Rate
from hmc.plan import load_plan, save_plan
from hmc.predict import measured as store
from hmc.predict.cost import Call, CostModel
from hmc.predict.loads import Load
from hmc.predict.measured import Predictor
from hmc.predict.run import run_prefill
from hmc.predict.timeline import host_prefill
from hmc.predict.timeline import run as timeline_of

Run = Callable[..., tuple[int, str, str]]


def _rate(value: float) -> Rate:
    return Rate(value=value, kind="assumed", source="test")


def _rated() -> Machine:
    here = detect()
    rates = CpuRates(
        read=(_rate(2e10),),
        gemv=tuple(GemvRate(format=form, tokens=1, rate=_rate(1e10)) for form in ("fp8", "bf16")),
        dot=_rate(2e11),
        attend=_rate(1e11),
        record=_rate(1e-6),
    )
    return here.model_copy(update={"rates": rates})


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(_CONFIG))
    return path


@pytest.fixture
def plan_file(config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HMC_CONFIG", str(tmp_path / "profiles"))
    path = tmp_path / "plan.hmp"
    save_plan(compile_plan(config, dummy_weights=True, max_chunk=16, threads=detect().cores), path)
    return path


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    path = tmp_path / "profiles" / "machine.json"
    path.parent.mkdir()
    path.write_text(_rated().model_dump_json())
    return path


@pytest.fixture
def hmc(capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([*map(str, arguments)])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


def _generate(hmc: Run, path: Path, *more: object) -> tuple[str, str]:
    code, out, err = hmc("run", path, "--dummy-weights", "--ids", "3,4,5,6,7", "-n", 6, *more)
    assert code == 0, err
    return out, err


# -- whose rates -----------------------------------------------------------------------------------


def test_rates_come_from_the_plan_then_the_profile(plan_file: Path, profile: Path) -> None:
    plan = load_plan(plan_file)
    found = machine_here(plan.machine)
    assert found is not None
    assert found.rates == _rated().rates
    mine = _rated().model_copy(update={"name": "the plan's"})
    assert machine_here(mine) == mine


def test_a_profile_that_cannot_be_looked_for_is_none(
    plan_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HMC_CONFIG", str(tmp_path / ("x" * 300)))
    assert machine_here(load_plan(plan_file).machine) is None


def test_rates_of_another_machine_predict_nothing(plan_file: Path, profile: Path) -> None:
    plan = load_plan(plan_file)
    other = _rated().model_copy(update={"cpu": "another CPU"})
    profile.write_text(other.model_dump_json())
    assert machine_here(plan.machine) is None
    assert machine_here(other) is None
    assert machine_here(plan.machine, str(profile)) == other  # who names one means it
    profile.write_text(detect().model_dump_json())
    with pytest.raises(MachineError, match="hmc probe"):
        machine_here(plan.machine, str(profile))


# -- the commands ----------------------------------------------------------------------------------


@pytest.mark.slow
def test_run_without_rates_says_how_to_get_them(hmc: Run, plan_file: Path) -> None:
    _, err = _generate(hmc, plan_file)
    assert "[no prediction: run `hmc probe" in err
    assert not store.path_of(plan_file).exists()


@pytest.mark.slow
def test_run_prints_one_line_and_stores_it(hmc: Run, plan_file: Path, profile: Path) -> None:
    for _ in range(2):
        _, err = _generate(hmc, plan_file)
    line = err.splitlines()[-1]
    assert line.startswith("[predicted prompt "), err
    assert line.count("measured") == 2
    assert line.count("error") == 2
    rows = store.read(plan_file, load_plan(plan_file))
    assert {(row.kind, row.tokens, row.by) for row in rows} == {
        ("prefill", 5, "hmc run"),
        ("decode", 8, "hmc run"),
    }
    stored = json.loads(store.path_of(plan_file).read_text())["rows"]
    assert len(stored) == 2  # the second run's figures replaced the first's
    assert all(row["predicted_tokens_per_second"] > 0 for row in stored)


def test_run_json_has_the_seconds_of_every_step(hmc: Run, plan_file: Path, profile: Path) -> None:
    out, _ = _generate(hmc, plan_file, "--json")
    found = json.loads(out)
    for kind in ("prefill", "decode"):
        figure = found["prediction"][kind]
        ratio = figure["predicted_tokens_per_second"] / figure["measured_tokens_per_second"]
        assert figure["error"] == pytest.approx(ratio - 1)
        steps = found["steps"][kind]
        assert {"linear", "experts", "attention", "route"} <= {step["op"] for step in steps}
        assert all(step["measured_s"] > 0 for step in steps)
    spent = sum(step["predicted_s"] for step in found["steps"]["decode"])
    decode = found["prediction"]["decode"]["predicted_tokens_per_second"]
    assert spent == pytest.approx(1 / decode)


@pytest.mark.slow
def test_threads_that_were_not_probed_predict_nothing(
    hmc: Run, plan_file: Path, profile: Path
) -> None:
    more = _rated().cores + 1
    profile.write_text(_rated().model_copy(update={"cores": more}).model_dump_json())
    _, err = _generate(hmc, plan_file, "--machine", profile)
    assert f"no prediction: the rates of {_rated().name} are those of {more} cores" in err


@pytest.mark.slow
def test_bench_has_predictions(hmc: Run, plan_file: Path, profile: Path) -> None:
    arguments = ["bench", plan_file, "--dummy-weights", "-p", 20, "-n", 4, "--context", 30]
    arguments += ["--repetitions", 2, "--megabytes", 4]
    code, out, err = hmc(*arguments, "--json")
    assert code == 0, err
    for row in json.loads(out)["rows"]:
        assert row["predicted_tokens_per_second"] > 0
        expected = row["predicted_tokens_per_second"] / row["tokens_per_second"] - 1
        assert row["error"] == pytest.approx(expected, abs=2e-3 * (2 + abs(expected)))
        assert all(step["measured_s"] > 0 for step in row["steps"]), row["test"]
    rows = store.read(plan_file, load_plan(plan_file))
    assert {(row.kind, row.tokens) for row in rows} == {("prefill", 20), ("decode", 32)}
    code, out, err = hmc(*arguments)
    assert code == 0, err
    assert "predicted" in out
    assert "error" in out


@pytest.mark.slow
def test_bench_predict_compares_every_load(hmc: Run, config: Path, profile: Path) -> None:
    code, out, err = hmc(
        *("bench", "predict", config, "--contexts", "8,40", "-p", "7", "-n", 2),
        *("--repetitions", 1, "--megabytes", 4, "--machine", profile, "--json"),
    )
    assert code == 0, err
    found = json.loads(out)
    tests = [(row["format"], row["test"]) for row in found["rows"]]
    assert tests == [(form, name) for form in ("fp8", "bf16") for name in ("tg@8", "tg@40", "pp7")]
    errors = sorted(abs(row["error"]) for row in found["rows"])
    assert found["median_error"] == pytest.approx((errors[2] + errors[3]) / 2)
    assert all(row["layers"] == 3 and row["experts"] == 16 for row in found["rows"])
    for row in found["rows"]:
        spent = sum(op["predicted_s"] for op in row["ops"].values())
        count = row["tokens"] if row["kind"] == "prefill" else 1
        assert count / spent == pytest.approx(row["predicted_tokens_per_second"])


def test_models_are_cut_to_what_fits(config: Path) -> None:
    whole = cut_to_fit(config, "bf16", 64, 1 << 40)
    assert (whole.model.layers, whole.experts[0].format) == (3, "bf16")
    less = total_bytes(whole) - 1
    assert cut_to_fit(config, "bf16", 64, less).model.layers == 2
    assert total_bytes(cut_to_fit(config, "bf16", 64, less)) <= less
    assert cut_to_fit(config, "bf16", 64, less, layers=1).model.layers == 1
    assert cut_to_fit(config, "bf16", 64, less, experts=8).model.layers == 3
    assert cut_to_fit(config, "fp8", 64, 1 << 40).experts[0].format == "fp8"
    with pytest.raises(CapacityError, match="--layers"):
        cut_to_fit(config, "bf16", 64, 1000)


# -- the model -------------------------------------------------------------------------------------


def test_only_the_last_chunk_computes_logits(plan_file: Path) -> None:
    plan = load_plan(plan_file)
    model = CostModel(plan, _rated())
    phase = plan.phase("prefill.host")
    calls = host_prefill(phase, 96)
    assert [call.logits for call in calls] == [False] * 5 + [True]
    head = [step for step in phase.steps if step.layer < 0 and step.op == "linear"]
    assert [model.step(phase, step, calls[0]).seconds for step in head] == [0.0]
    assert all(model.step(phase, step, calls[-1]).seconds > 0 for step in head)
    total = sum(timeline_of(phase, call, model).result for call in calls)
    # three calls stand for six: exact where time is linear in the context
    assert run_prefill(plan, model, 96).seconds == pytest.approx(total, rel=0.01)


def test_long_contexts_cost_their_cache_in_decode(plan_file: Path) -> None:
    plan = load_plan(plan_file)
    model = CostModel(plan, _rated())
    phase = plan.phase("decode")
    step = next(each for each in phase.steps if each.op == "attention")
    record = 1e-6 * len(step.kernels)
    cost = model.step(phase, step, Call(1, 100_000, 1))
    assert cost.bound == "cache"
    kept = sum(state.bytes for state in plan.kv.states(step.layer))
    assert cost.seconds - record == pytest.approx(kept * 100_001 / 2e10)


def test_a_predictor_is_the_simulator(plan_file: Path) -> None:
    predictor = Predictor(load_plan(plan_file), _rated())
    assert predictor.rate(Load("decode", 10)) > predictor.rate(Load("decode", 200))
    figure = predictor.figure(Load("prefill", 10), [3.0, 5.0])
    assert math.isclose(figure.error, figure.predicted_tokens_per_second / 4 - 1)
    assert (figure.low, figure.high) == (3.0, 5.0)


def test_looking_for_rates_loads_no_simulator() -> None:
    code = "import sys, hmc.cli.run_command; sys.exit('hmc.predict.run' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_stored_rows_of_older_files_are_read(tmp_path: Path, plan_file: Path) -> None:
    plan = load_plan(plan_file)
    row: dict[str, Any] = {"kind": "decode", "tokens": 8, "tokens_per_second": 2.0}
    row |= {"low": 1.0, "high": 3.0, "plan_sha256": store.digest(plan)}
    store.path_of(plan_file).write_text(json.dumps({"format": "hmc-measured", "rows": [row]}))
    (found,) = store.read(plan_file, plan)
    assert found.predicted_tokens_per_second is None
