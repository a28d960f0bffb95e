"""Every command that takes a model takes one of the hub, and fetches of it what it needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf_files import write_gguf
from hub_commands import COMMIT, EXAMPLE, Run, refused
from played_hub import PlayedHub

import hmc
from hmc.checkpoint import Checkpoint
from hmc.hub import cache
from hmc.quantize.write import REPORT_NAME

NAME = "king/tiny-kjv"
LITTLE = ["-p", 0, "-n", 2, "--repetitions", 1, "--megabytes", 1]


def test_simulate_fetches_no_weights(king: PlayedHub, run: Run) -> None:
    code, out, err = run("simulate", NAME, "--prompt", 64, "--machine", "laptop", "--json")
    assert code == 0, err
    here = run("simulate", EXAMPLE, "--prompt", 64, "--machine", "laptop", "--json")
    assert json.loads(out) == json.loads(here[1])
    assert not king.sent(".safetensors")


def test_simulate_of_a_gguf_file_reads_its_header(
    hub: PlayedHub, run: Run, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    path = tmp_path / "published" / "m.gguf"
    path.parent.mkdir()
    write_gguf(path, checkpoint("mixtral", "bf16"), "BF16")
    hub.add("a/b", path.parent)
    asked = ["--prompt", 64, "--machine", "laptop", "--json"]
    code, out, err = run("simulate", f"a/b:{path.name}", *asked)
    assert code == 0, err
    assert json.loads(out) == json.loads(run("simulate", path, *asked)[1])
    assert hub.sent(".gguf") and not cache.snapshot("a/b", COMMIT).exists()


@pytest.mark.slow
def test_bench_fetches_weights_unless_they_are_dummies(king: PlayedHub, run: Run) -> None:
    code, _, err = run("bench", NAME, "--dummy-weights", "--layers", 2, *LITTLE)
    assert code == 0 and not king.sent(".safetensors"), err
    code, _, err = run("bench", NAME, *LITTLE)
    assert code == 0 and "[fetching 1 file" in err, err
    assert (cache.snapshot(NAME, COMMIT) / "model.safetensors").exists()


def test_tune_changes_the_plan_of_a_model(king: PlayedHub, run: Run) -> None:
    code, _, err = run("tune", NAME, "-o", "tuned.hmp", "--set", "chunk=64")
    assert code == 0 and "[compiled king/tiny-kjv@" in err, err
    plan = hmc.load_plan("tuned.hmp")
    assert plan.checkpoint.hub == f"{NAME}@{COMMIT}" and plan.limits.max_chunk == 64
    assert run("run", "tuned.hmp", "-p", "And", "-n", 1)[0] == 0


@pytest.mark.slow
def test_quantize_fetches_the_whole(king: PlayedHub, run: Run) -> None:
    code, _, err = run("quantize", NAME, "-o", "few", "--format", "int4")
    assert code == 0 and "[fetching 1 file" in err, err
    assert run("quantize", EXAMPLE, "-o", "same", "--format", "int4")[0] == 0
    assert Path("few/model.safetensors").read_bytes() == Path("same/model.safetensors").read_bytes()
    assert Path("few", REPORT_NAME).exists() and Checkpoint.open("few").tensors
    assert run("run", "few", "-p", "And", "-n", 1)[0] == 0


def test_bench_predict_reads_the_config(
    king: PlayedHub, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Path] = []

    def compare(config: Path, *_: object, **__: object) -> list[dict[str, object]]:
        asked.append(config)
        return [{"error": 0.1}]

    monkeypatch.setattr("hmc.bench.predict.compare", compare)
    given = ["--machine", "laptop", "--formats", "bf16", "--json"]
    code, _, err = run("bench", "predict", NAME, *given)
    assert code == 0, err
    assert asked == [cache.snapshot(NAME, COMMIT)] and (asked[0] / "config.json").exists()
    assert not king.sent(".safetensors")


@pytest.mark.slow
def test_bench_serve_serves_a_model(king: PlayedHub, run: Run) -> None:
    code, out, err = run(
        *("bench", "serve", NAME, "-n", 2, "--prompt", "8", "--output", "4", "--json"),
        *("--serve-options", "--threads 1"),
    )
    assert code == 0 and "[fetching 1 file" in err, err
    assert json.loads(out)["failed"] == 0


@pytest.mark.parametrize(
    "command",
    [
        ("simulate",),
        ("bench",),
        ("bench", "serve"),
        ("tune", "-o", "t.hmp"),
        ("quantize", "-o", "q", "--format", "int4"),
    ],
)
def test_what_is_no_model_is_told_alike(run: Run, command: tuple[str, ...]) -> None:
    refused(run(*command, "nowhere/at/all"), 2, "no hub id, which is org/name")
