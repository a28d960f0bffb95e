"""The command line on real checkpoints: what it prints, its JSON, and one clear line for every kind
of bad input.
"""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hmc.cli import main
from hmc.codegen.isa import TIERS
from hmc.machine.detect import load_machine

Run = Callable[..., tuple[int, str, str]]


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
def model(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("qwen3_moe", "fp8", with_tokenizer=True)


@pytest.fixture
def plan(model: Path, tmp_path: Path, run: Run) -> Path:
    path = tmp_path / "plan.hmp"
    assert run("compile", model, "-o", path)[0] == 0
    return path


@pytest.fixture
def copy(model: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may break."""
    return Path(shutil.copytree(model, tmp_path / "model"))


def assert_one_line(code: int, err: str, expected_code: int, *parts: str) -> None:
    assert code == expected_code, err
    assert err.startswith("hmc: error: ")
    assert err.count("\n") == 1, err
    for part in parts:
        assert part in err


def test_compile_says_what_it_made(model: Path, tmp_path: Path, run: Run) -> None:
    code, out, _ = run("compile", model, "-o", tmp_path / "plan.hmp")
    assert code == 0
    assert "3 layers x 8 experts" in out
    code, out, _ = run("compile", model, "-o", tmp_path / "plan.hmp", "--json")
    assert json.loads(out)["family"] == "qwen3_moe"


def test_show(plan: Path, run: Run) -> None:
    code, out, _ = run("show", plan)
    assert code == 0
    for part in ("Memory", "Experts", "Phases", "Kernels", "Decisions", "KV cache", "lower"):
        assert part in out
    code, out, _ = run("show", plan, "--json")
    assert json.loads(out)["model"]["family"] == "qwen3_moe"


def test_show_layer_expert_graph(plan: Path, run: Run) -> None:
    _, out, _ = run("show", plan, "--layer", 0)
    assert "experts_gate_up" in out
    _, out, _ = run("show", plan, "--layer", 0, "--expert", 3, "--json")
    found = json.loads(out)
    assert found["tier"] == "host"
    assert [(tensor["role"], tensor["plane"]) for tensor in found["tensors"]] == [
        (role, plane) for role in ("gate", "up", "down") for plane in ("codes", "scale")
    ]
    _, out, _ = run("show", plan, "--graph")
    assert "prefill.host:" in out
    assert "add_norm" in out


def test_show_kernel_text(plan: Path, run: Run) -> None:
    code, out, _ = run("show", plan, "--ir", "route")
    assert code == 0
    assert 'define void @"route' in out
    code, out, _ = run("show", plan, "--asm", "route")
    assert ".globl" in out


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("--expert", "1"), ("--expert needs --layer",)),
        (("--layer", "99"), ("layers 0 to 2",)),
        (("--layer", "1", "--expert", "0"), ("dense",)),
        (("--layer", "0", "--expert", "8"), ("experts 0 to 7",)),
        (("--asm", "nonesuch"), ("not in the plan", "route-")),
    ],
)
def test_show_refuses(plan: Path, run: Run, arguments: Any, parts: Any) -> None:
    code, _, err = run("show", plan, *arguments)
    assert_one_line(code, err, 2, *parts)


def test_run_streams_text_and_a_closing_line(plan: Path, run: Run) -> None:
    code, out, err = run("run", plan, "-p", "the quick", "-n", 5, "--temperature", 0)
    assert code == 0
    assert out.strip()
    assert "TTFT" in err
    assert "tok/s" in err
    assert "fp8" in err
    assert any(isa in err for isa in ("avx512_bf16", "avx512", "avx2"))


def test_run_json_is_deterministic_with_a_seed(plan: Path, run: Run) -> None:
    arguments = ("run", plan, "-p", "the quick", "-n", 6, "--temperature", 1.2, "--seed", 3)
    first = json.loads(run(*arguments, "--json")[1])
    second = json.loads(run(*arguments, "--json")[1])
    assert first["token_ids"] == second["token_ids"]
    assert first["finish_reason"] in ("length", "stop")
    assert first["timings"]["prompt_tokens"] > 0


def test_run_ids_prompts_chat_and_stdin(
    plan: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert (
        len(json.loads(run("run", plan, "--ids", "5,6,7", "-n", 3, "--json")[1])["token_ids"]) <= 3
    )
    lines = [
        {"prompt": "the fox"},
        {"ids": [4, 5]},
        {"messages": [{"role": "user", "content": "x"}]},
    ]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(map(json.dumps, lines)))
    answers = run("run", plan, "--prompts", prompts, "-n", 2, "--json")[1].splitlines()
    assert len([json.loads(line) for line in answers]) == 3
    assert run("run", plan, "--chat", "-p", "hello", "-n", 2)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("from a pipe"))
    assert run("run", plan, "-n", 2)[0] == 0
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n/stats\n"))
    code, out, _ = run("run", plan, "--chat", "-n", 2)
    assert code == 0 and "context: " in out


def test_run_writes_a_chrome_trace(plan: Path, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    assert run("run", plan, "--ids", "5,6,7", "-n", 4, "--trace", path)[0] == 0
    events = json.loads(path.read_text())["traceEvents"]
    spans = [event for event in events if event["ph"] == "X"]
    assert {event["cat"] for event in spans} == {"prefill.host", "decode"}
    assert {"experts", "linear", "attention"} <= {event["name"] for event in spans}
    assert all(event["dur"] >= 0 and event["ts"] >= 0 for event in spans)
    decode = [event for event in spans if event["cat"] == "decode" and event["tid"] == 0]
    starts = [event["ts"] for event in decode]
    assert starts == sorted(starts)
    code, _, err = run("run", plan, "--ids", "5", "-n", 1, "--trace", tmp_path / "no" / "t.json")
    assert_one_line(code, err, 2, "folder does not exist")


def test_a_model_without_tokenizer_runs_by_ids(
    copy: Path, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (copy / name).unlink()
    path = tmp_path / "ids.hmp"
    run("compile", copy, "-o", path)
    code, out, _ = run("run", path, "--ids", "1,2,3", "-n", 4, "--temperature", 0)
    assert code == 0
    assert all(word.isdigit() for word in out.split())
    # what is asked is checked before weights are opened
    monkeypatch.setattr(
        "hmc.runtime.weights.store.WeightStore.open", lambda *_, **__: pytest.fail("opened")
    )
    code, _, err = run("run", path, "-p", "text")
    assert_one_line(code, err, 2, "tokenizer")
    code, _, err = run("run", path, "--chat")
    assert_one_line(code, err, 2, "no chat template")
    code, _, err = run("run", path, "--ids", "1", "--stop", "x")
    assert_one_line(code, err, 2, "stop")
    code, _, err = run("run", path, "--ids", "1", "--top-p", "2")
    assert_one_line(code, err, 2, "top_p")
    code, _, err = run("run", path, "--ids", "1", "-n", 0)
    assert_one_line(code, err, 2, "max_new_tokens")
    with pytest.raises(pytest.fail.Exception, match="opened"):
        run("run", path, "--ids", "1")


def test_run_refuses_bad_arguments(plan: Path, run: Run, tmp_path: Path) -> None:
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "x"}\n{"other": 1}\n')
    cases: list[tuple[tuple[object, ...], str]] = [
        (("-p", ""), "empty"),
        (("-p", "x", "--ids", "1"), "give one of"),
        (("--ids", "1,b"), "whole numbers"),
        (("--ids", "999999"), "vocabulary"),
        (("--ids", ",".join(["5"] * 1100)), "context"),
        (("-p", "x", "--temperature", "-1"), "temperature"),
        (("-p", "x", "--top-p", "1.5"), "top_p"),
        (("-p", "x", "-n", "0"), "max_new_tokens"),
        (("-p", "x", "--system", "y"), "--system needs --chat"),
        (("--prompts", bad), "line 2"),
    ]
    for arguments, part in cases:
        code, _, err = run("run", plan, *arguments)
        assert_one_line(code, err, 2, part)


def test_compile_refuses_wrong_paths_and_options(model: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "plan.hmp"
    cases: list[tuple[tuple[object, ...], int, str]] = [
        ((tmp_path / "nowhere",), 2, "no such directory"),
        ((model / "config.json",), 2, "a file"),
        ((tmp_path,), 3, "config.json"),
        ((model, "--max-context", 10**9), 2, "max_position_embeddings"),
        ((model, "--layers", 1), 2, "--layers"),
        ((model, "--machine", tmp_path / "none.json"), 2, "none.json"),
    ]
    for arguments, code, part in cases:
        found, _, err = run("compile", *arguments, "-o", out)
        assert_one_line(found, err, code, part)
        assert not out.exists()
    found, _, err = run("compile", model, "-o", tmp_path / "no" / "plan.hmp")
    assert_one_line(found, err, 5, "cannot write the plan")


def test_unknown_family(copy: Path, run: Run, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"model_type": "nonesuch"}))
    code, _, err = run("compile", copy, "-o", tmp_path / "plan.hmp")
    assert_one_line(code, err, 4, "nonesuch", "qwen3_moe")


def test_truncated_shard(copy: Path, run: Run, tmp_path: Path) -> None:
    shard = next(copy.glob("*.safetensors"))
    with shard.open("r+b") as file:
        file.truncate(shard.stat().st_size - 100)
    code, _, err = run("compile", copy, "-o", tmp_path / "plan.hmp")
    assert_one_line(code, err, 3, shard.name)


def test_run_refuses_a_changed_checkpoint(copy: Path, run: Run, tmp_path: Path) -> None:
    path = tmp_path / "plan.hmp"
    run("compile", copy, "-o", path)
    (copy / "config.json").write_text((copy / "config.json").read_text() + " ")
    code, _, err = run("run", path, "-p", "x")
    assert_one_line(code, err, 5, "config.json")
    shutil.rmtree(copy)
    code, _, err = run("run", path, "-p", "x")
    assert code in (3, 5)
    assert err.startswith("hmc: error: ")


def test_run_refuses_a_machine_without_the_isa(
    plan: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmc.codegen.isa.cpu_flags", lambda: frozenset({"avx2"}))
    code, _, err = run("run", plan, "-p", "x")
    assert_one_line(code, err, 5, "lacks")


@pytest.mark.parametrize(("isa", "whole"), [("avx512_bf16", False), ("avx2", True)])
def test_show_says_how_int4_is_multiplied(
    checkpoint: Callable[..., Path], run: Run, tmp_path: Path, isa: str, whole: bool
) -> None:
    path, machine = tmp_path / "plan.hmp", tmp_path / "machine.json"
    found = load_machine("auto").model_copy(update={"flags": tuple(TIERS[isa].flags)})
    machine.write_text(found.model_dump_json())
    assert run("compile", checkpoint("qwen3_moe", "int4"), "-o", path, "--machine", machine)[0] == 0
    code, out, _ = run("show", path)
    assert code == 0 and "exact: stored weights" in out
    assert ("whole" in out) == whole


def test_run_refuses_a_plan_for_a_gpu(model: Path, run: Run, tmp_path: Path) -> None:
    path, machine = tmp_path / "gpu.hmp", tmp_path / "machine.json"
    found = load_machine("epyc9355-rtx5090")
    machine.write_text(
        found.model_copy(update={"flags": load_machine("auto").flags}).model_dump_json()
    )
    assert run("compile", model, "-o", path, "--machine", machine)[0] == 0
    code, _, err = run("run", path, "--ids", "1")
    assert_one_line(code, err, 5, "epyc9355-rtx5090", "--devices host")


def test_run_refuses_kernels_that_the_cpu_lacks(
    plan: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmc.codegen.isa.cpu_flags", lambda: frozenset({"avx2"}))
    code, _, err = run("run", plan, "-p", "x")
    assert_one_line(code, err, 5, "needs", "fma", "which this CPU lacks", "--machine auto")


def test_run_refuses_too_little_memory(
    plan: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmc.runtime.executor.available_bytes", lambda: 1000)
    code, _, err = run("run", plan, "-p", "x")
    assert_one_line(code, err, 5, "memory")


def test_doctor(run: Run) -> None:
    code, out, _ = run("doctor")
    assert code == 0
    assert "kernel tier" in out
    rows = json.loads(run("doctor", "--json")[1])["rows"]
    assert {"CPU", "memory", "GPU", "torch"} <= {row["item"] for row in rows}


def test_help_of_every_command(run: Run) -> None:
    for words in (("compile",), ("run",), ("show",), ("bench", "model"), ("doctor",)):
        code, out, _ = run(*words, "--help")
        assert code == 0
        assert "--json" in out


def test_ctrl_c_ends_cleanly(plan: Path) -> None:
    """SIGINT while tokens stream: exit code 130, no traceback, text so far kept."""
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "hmc", "run", str(plan)),
            *("--ids", "5,6,7", "-n", "900", "--temperature", "0"),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    process.stdout.read(1)
    process.send_signal(2)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "Traceback" not in err
