"""The GPU check with the CPU playing the GPU: every section's rows, figures that are numbers, the
exit code, and what becomes of a section that fails or has no time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gpu import check as gpu_check
from gpu import parity as gpu_parity
from gpu.models import DEEPSEEK, MIXTRAL, QWEN
from gpu.rows import Clock, Row, Section, run_sections, sound, text_table
from gpu.sizes import Sizes
from hmc.bench.probe import Effort, save
from hmc.errors import ExecutionError
from hmc.machine.detect import load_machine

TINY = Sizes(
    prompts=(48, 96),
    ring_prompt=64,
    chunk=32,
    decode_steps=2,
    repetitions=1,
    product=(128, 256, 16),
    copy=1 << 20,
    effort=Effort(2, 16, 16, (1,), 64, 1 << 20),
    parity=((DEEPSEEK, "fp8"),),
)


@pytest.fixture
def rates(tmp_path: Path) -> Path:
    """A machine file with the CPU rates of a named machine: what is predicted is not looked at."""
    named, here = load_machine("desktop-rtx4090"), load_machine("auto")
    assert named.rates is not None
    read = named.rates.read[:1] * len(here.nodes)
    path = tmp_path / "rates.json"
    save(here.model_copy(update={"rates": named.rates.model_copy(update={"read": read})}), path)
    return path


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "SMALL", TINY)


@pytest.mark.slow
@pytest.mark.usefixtures("tiny")
def test_the_whole_check_runs_on_the_host(
    rates: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "rows.json"
    code = gpu_check.main(["--devices", "host", "--rates", str(rates), "--json", str(target)])
    out, err = capsys.readouterr()
    assert code == 0, out + err
    rows = json.loads(target.read_text())["rows"]
    assert all(math.isfinite(row["value"]) and row["value"] > 0 for row in rows), rows
    assert all(row["reference"] is None or row["reference"] > 0 for row in rows), rows
    by: dict[str, list[dict[str, str]]] = {}
    for row in rows:
        by.setdefault(row["section"], []).append(row)
    assert list(by) == [
        "probe",
        "products",
        "parity",
        f"stream {QWEN}",
        f"decode {QWEN}",
        f"ring {QWEN}",
        f"stream {DEEPSEEK}",
        f"decode {DEEPSEEK}",
    ]
    assert len(by["parity"]) == 3
    assert {row["verdict"] for row in by["parity"]} == {"ok"}
    for name in (QWEN, DEEPSEEK):
        assert [row["case"] for row in by[f"stream {name}"]] == ["48 tokens"] * 4 + [
            "96 tokens"
        ] * 4
        assert len({row["case"] for row in by[f"decode {name}"]}) == 5
        shares = [row["note"] for row in by[f"decode {name}"] if "resident" in row["note"]]
        assert shares and all(not share.startswith(("0%", "100%")) for share in shares)
        overlap = [row for row in by[f"stream {name}"] if row["what"].startswith("longer of")]
        assert all(0 < float(row["ratio"]) <= 1.001 for row in overlap)
    assert [row["case"] for row in by[f"ring {QWEN}"]] == [f"ring of {n}" for n in (2, 4, 8, 16)]
    assert out.count("\n") == len(rows) + 3
    for row in rows:
        assert row["what"] in out


@pytest.mark.usefixtures("tiny")
@pytest.mark.slow
def test_a_wrong_result_and_an_error_are_rows_and_the_exit_code(
    rates: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*arguments: object) -> Iterator[Row]:
        yield Row("stream", "", "before", 1.0)
        raise ExecutionError("the copy engine is on strike")

    monkeypatch.setattr(gpu_check, "stream", broken)
    monkeypatch.setattr(gpu_check, "decode", lambda *arguments: iter(()))
    monkeypatch.setattr(gpu_check, "rings", lambda *arguments: 1 / 0)
    monkeypatch.setattr(gpu_check, "parity", parity_off_by_a_tenth(monkeypatch))
    assert gpu_check.main(["--devices", "host", "--rates", str(rates)]) == 1
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert sum("FAILED the copy engine is on strike" in line for line in lines) == 2
    assert sum("before" in line for line in lines) == 2
    assert sum("FAILED ZeroDivisionError: division by zero" in line for line in lines) == 1
    assert "Traceback" in err
    verdicts = [line for line in lines if line.startswith("parity")]
    assert len(verdicts) == 3 and all(" FAILED " in line for line in verdicts)
    assert any(line.startswith("products") and " ok" in line for line in lines)


def parity_off_by_a_tenth(monkeypatch: pytest.MonkeyPatch) -> object:
    """The parity section of one model, whose CPU logits are a tenth too large."""
    real = gpu_parity._logits

    def scaled(plan, directory, phases, devices):  # type: ignore[no-untyped-def]
        found = real(plan, directory, phases, devices)
        factor = 1.1 if devices == "auto" else 1.0
        return {name: logits * factor for name, logits in found.items()}

    monkeypatch.setattr(gpu_parity, "_logits", scaled)
    monkeypatch.setattr(
        gpu_check, "SMALL", TINY.__class__(**{**vars(TINY), "parity": ((MIXTRAL, "bf16"),)})
    )
    return gpu_parity.parity


def test_what_there_is_no_time_for_is_left_out_and_told() -> None:
    def slow(clock: Clock) -> Iterator[Row]:
        clock.check("the first")
        yield Row("slow", "", "first", 1.0)
        clock.check("the second")
        yield Row("slow", "", "second", 1.0)

    def quick(clock: Clock) -> Iterator[Row]:
        clock.check("the only one")
        yield Row("quick", "", "only", 1.0, verdict="missed")

    told: list[str] = []
    rows = run_sections([Section("slow", 0, slow), Section("quick", 9, quick)], 9, told.append)
    assert [(row.section, row.verdict) for row in rows] == [
        ("slow", "left out"),
        ("quick", "missed"),
    ]
    assert "the first and what follows" in rows[0].note
    assert len(told) == 2
    assert not sound(rows)
    assert sound(rows[1:])  # a goal of speed that is missed is no fault
    assert not sound([])
    rows = run_sections([Section("quick", 9, quick)], 0, told.append)
    assert [row.verdict for row in rows] == ["left out"]


def test_the_table_shows_units_that_read_well() -> None:
    rows = [
        Row("a", "b", "loads", 5.2e10, "B/s", "plain copy", 5.5e10, "missed"),
        Row("a", "b", "launch", 2.5e-6, "s"),
    ]
    heading, first, second = text_table(rows).splitlines()
    assert heading.split() == "section case what value against reference ratio verdict".split()
    assert "52 GB/s" in first and "55 GB/s" in first and "0.945" in first
    assert first.endswith("missed")
    assert second.endswith("2.5 µs")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert gpu_check.main([]) == 5
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert "no GPU" in err and "--devices host" in err
