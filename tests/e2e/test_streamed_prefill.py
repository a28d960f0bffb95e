"""Plans for GPUs on the command line, with the CPU playing the GPUs: the same text as the CPU plan,
the phases that ran, and one clear line for what goes wrong.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_plans import with_memory
from split_plans import DUAL, STREAM, split_plan

from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.plan import save_plan
from hmc.runtime.device_ops import DEVICE_OPS

Run = Callable[..., tuple[int, str, str]]

TINY = Path(__file__).parents[2] / "examples" / "tiny-kjv"
TEXT = "And the king said unto the people of the land, Behold, I have done this day"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of the command line in this
    process.
    """

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files of a plan for the CPU, and of plans for one and two GPUs."""
    folder = tmp_path_factory.mktemp("plans")
    found = {
        "cpu": compile_plan(TINY, max_context=256, threads=2),
        "one": split_plan(TINY, switches=True),
        "two": split_plan(TINY, gpus=2, switches=True),
    }
    for name, plan in found.items():
        save_plan(plan, folder / f"{name}.hmp")
    return {name: folder / f"{name}.hmp" for name in found}


def answer(run: Run, plan: Path, *arguments: object) -> dict[str, Any]:
    code, out, err = run(
        "run", plan, "-p", TEXT, "-n", 12, "--temperature", 0, "--threads", 2, "--json", *arguments
    )
    assert code == 0, err
    result: dict[str, Any] = json.loads(out)
    return result


@pytest.mark.parametrize("name", [pytest.param("one", marks=pytest.mark.slow), "two"])
def test_run_streams_the_prompt_and_decodes_on_both(
    name: str, plans: dict[str, Path], run: Run
) -> None:
    wanted = answer(run, plans["cpu"])
    assert wanted["phases"] == {"prefill.host": 1, "decode": 11}
    found = answer(run, plans[name], "--devices", "host")
    assert found["token_ids"] == wanted["token_ids"]
    assert found["phases"] == {STREAM: 1, "decode": 11}
    assert any(kernel.startswith("triton:experts-k") for kernel in found["kernels"])
    assert any(kernel.startswith("experts_") for kernel in found["kernels"])


def test_the_closing_line_names_the_phases_and_a_trace_shows_them(
    plans: dict[str, Path], run: Run, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.json"
    code, _, err = run(
        *("run", plans["one"], "-p", TEXT, "-n", 4, "--temperature", 0, "--threads", 2),
        *("--devices", "host", "--trace", trace),
    )
    assert code == 0, err
    assert "| prefill.stream, decode x 3 |" in err
    events = json.loads(trace.read_text())["traceEvents"]
    rows = {each["args"]["name"] for each in events if each["ph"] == "M"}
    assert {"stream gpu0", "stream h2d0", "stream cpu"} <= rows
    assert {each["cat"] for each in events if each["ph"] == "X"} == {STREAM, "decode"}


@pytest.mark.slow
def test_bench_runs_the_phases_named(plans: dict[str, Path], run: Run) -> None:
    code, out, err = run(
        *("bench", plans["one"], "-p", 24, "-n", 3, "--repetitions", 1, "--megabytes", 8),
        *("--devices", "host", "--threads", 2, "--json"),
        *("--phase", STREAM, "--phase", DUAL),
    )
    assert code == 0, err
    found = json.loads(out)
    assert set(found["phases"]) == {STREAM, DUAL}
    assert [row["test"] for row in found["rows"]] == ["pp24", "tg3"]
    assert {op["op"] for op in found["rows"][1]["ops"]} >= {"experts", "copy", "split"}
    code, _, err = run("bench", plans["one"], "-p", 24, "--phase", "decode.tripled")
    assert (code, err.count("\n")) == (2, 1)
    assert "the plan has prefill.host, decode, decode.dual, prefill.stream" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_what_to_do(plans: dict[str, Path], run: Run) -> None:
    code, _, err = run("run", plans["one"], "-p", TEXT)
    assert (code, err.count("\n")) == (5, 1)
    assert err.startswith("hmc: error: the plan needs 1 GPU")
    assert "--devices host" in err


def test_faults_end_in_one_line(
    plans: dict[str, Path], run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = split_plan(TINY)
    small = tmp_path / "small.hmp"
    save_plan(plan.model_copy(update={"machine": with_memory(plan.machine, 1 << 20)}), small)
    arguments = ("-p", TEXT, "-n", 4, "--threads", 2, "--devices", "host")
    code, _, err = run("run", small, *arguments)
    assert (code, err.count("\n")) == (5, 1)
    assert "gpu0 cannot hold" in err

    def broken(bound: Any, step: Any) -> Callable[[Any], None]:
        def work(call: Any) -> None:
            raise RuntimeError("no such kernel image")

        return work

    monkeypatch.setitem(DEVICE_OPS, "sort", broken)
    code, _, err = run("run", plans["one"], *arguments)
    told = [line for line in err.splitlines() if line and not line.startswith("[decode: ")]
    assert (code, len(told)) == (6, 1)
    assert "phase prefill.stream, step" in err
    assert "failed on gpu0: RuntimeError: no such kernel image" in err
