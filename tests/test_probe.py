"""`hmc probe` runs, and writes a machine that the compiler and the simulator take; figures are not
judged.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from hmc.bench.cases import Case, Row
from hmc.bench.compare import Compared
from hmc.bench.probe import Effort, Measurement, cpu, gpu, probe, save
from hmc.cli import main
from hmc.compiler import compile as compile_plan
from hmc.errors import PlanError
from hmc.machine.detect import detect, load_machine
from hmc.machine.topology import this_machine
from hmc.predict.run import simulate

CONFIG = Path(__file__).parent.parent / "examples" / "configs" / "qwen3-30b-a3b-fp8"
TINY = Effort(passes=2, weights=1, stream=1, tokens=(1, 3), every=24, device_bytes=1 << 16)

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """`run(*arguments)`: (exit code, standard output, standard error) of `hmc probe`."""

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            main(["probe", *map(str, arguments)])
        out, err = capsys.readouterr()
        code = stopped.value.code
        return (code if isinstance(code, int) else 0), out, err

    return call


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes and times for a test."""
    monkeypatch.setattr(cpu, "_LINEAR", (96, 256))
    monkeypatch.setattr(cpu, "_EXPERTS", ((128, 128), (128, 256)))
    monkeypatch.setattr(cpu, "_CHUNK", 20)
    monkeypatch.setattr(cpu, "_CONTEXT", 128)
    monkeypatch.setattr("hmc.bench.probe.FULL", TINY)
    monkeypatch.setattr("hmc.bench.probe.QUICK", TINY)


@pytest.mark.slow
def test_a_probe_has_every_rate(small: None) -> None:
    told: list[tuple[str, int, int]] = []
    found = probe(TINY, threads=2, report=lambda *what: told.append(what))
    rates = found.machine.rates
    assert rates is not None
    assert found.machine.model_copy(update={"rates": None, "gpus": ()}) == detect()
    assert len(rates.read) == len(found.machine.nodes)
    points: set[tuple[str, int]] = {(each.format, each.tokens) for each in rates.gemv}
    assert points == {(form, tokens) for form in ("fp8", "bf16", "int4") for tokens in (1, 3)}
    for rate in (*rates.read, rates.dot, rates.attend, rates.record):
        assert rate.kind == "measured"
        assert rate.source.startswith("measured 20")
        assert math.isfinite(rate.value) and rate.value > 0
    assert 1e-9 < rates.record.value < 1e-2
    names = {each.what for each in found.measurements}
    assert {"multiply-add peak", "experts in decode", "gemm in prefill"} <= names
    cores = sum(len(node.cores) for node in this_machine().nodes)
    assert ("read with fewer threads" in names) == (cores > len(found.machine.nodes))
    assert told[-1][1] == told[-1][2]


@pytest.mark.slow
def test_the_file_plans_and_predicts(small: None, tmp_path: Path, run: Run) -> None:
    path = tmp_path / "machine.json"
    code, out, err = run("-o", path, "--quick", "--threads", 2, "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    for row in found["measurements"]:
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert row["passes"] >= 1
    machine = load_machine(str(path))
    assert machine.rates is not None
    plan = compile_plan(CONFIG, machine=machine, dummy_weights=True, layers=2, max_context=700)
    assert simulate(plan, prompt=512).decode_rate > 0
    assert [each.name for each in tmp_path.iterdir()] == ["machine.json"]


@pytest.mark.slow
def test_the_table_and_the_default_place(
    small: None, tmp_path: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HMC_CONFIG", str(tmp_path / "config"))
    monkeypatch.setitem(probe.__kwdefaults__, "formats", ("fp8",))
    code, out, _ = run()
    assert code == 0
    for part in ("hmc probe", "gemv", "fp8 96x256", "GB/s", "GFLOP/s", "us", "0 GPU"):
        assert part in out
    assert load_machine(str(tmp_path / "config" / "machine.json")).rates is not None


def test_refusals(tmp_path: Path, run: Run) -> None:
    code, out, err = run("-o", tmp_path / "m.json", "--threads", 0)
    assert (code, out) == (2, "")
    assert "'--threads': 0" in err
    with pytest.raises(PlanError, match="cannot write the machine"):
        save(detect(), tmp_path / "no" / "m.json")


def test_median_and_spread() -> None:
    found = Measurement("read", "B/s", (8.0, 10.0, 14.0), "node 0")
    assert (found.median, found.spread) == (10.0, 0.3)
    assert found.rate().value == 10.0
    assert found.rate().spread == 0.3


def test_drift_of_the_machine_cancels() -> None:
    """A kernel at half of the read's rate is so whatever the minute gives."""

    def row(op: str, share: float, speed: float, rows: int = 32) -> Row:
        case = Case(op, "bf16", rows, 64, 1 if op != "gemm" else 20)
        return Row(case, Compared((share * speed,) * 3, (speed,) * 3, (speed,) * 3))

    rows = [
        row("linear", 0.8, 1e9),
        row("linear", 0.8, 2e9),
        row("experts", 0.7, 4e9),
        row("gemm", 0.6, 8e9),
    ]
    found = {each.what: each for each in cpu.matmuls(rows)}
    assert found["gemv"].median == pytest.approx(1.6e9)  # of the references' median
    assert found["gemm in prefill"].median == pytest.approx(4.8e9)
    assert found["experts"].values == pytest.approx((1.4e9,) * 3)
    slow = [row("linear", 0.8, 2e9), row("experts", 0.25, 4e9), row("gemm", 0.6, 8e9)]
    by_itself = {each.what: each for each in cpu.matmuls(slow)}
    assert by_itself["experts"].values == pytest.approx((1e9,) * 3)  # whatever memory does
    assert "expert" not in found  # one size does not tell rate and rest apart
    # of 12,288 and 24,576 bytes: 2e-5 s, 3e-5 s, so 1e-5 beyond the bytes at 1.2288e9 B/s
    sizes = [row("experts", 0.6144, 1e9), row("experts", 0.8192, 1e9, 64)]
    both = {
        each.what: each
        for each in cpu.matmuls([row("linear", 0.5, 1e9), *sizes, row("gemm", 0.6, 8e9)])
    }
    assert both["experts"].values == pytest.approx((1.2288e9,) * 3)
    assert both["expert"].values == pytest.approx((1e-5,))


# -- GPUs, on PyTorch's CPU device -----------------------------------------------------------------


def test_gpu_measurements_make_rates() -> None:
    found = gpu.Device(torch.device("cpu"), TINY).measure()
    names = [each.what for each in found]
    assert len(names) == len(set(names)) == 10
    for each in found:
        assert len(each.values) == TINY.passes
        assert all(math.isfinite(value) and value > 0 for value in each.values)
    rates = gpu.gpu_rates(found)
    assert rates.fp8 is None
    assert rates.h2d_both is not None and rates.d2h_both is not None
    with_fp8 = [*found, Measurement("gpu fp8", "FLOP/s", (5.0,), "x")]
    assert gpu.gpu_rates(with_fp8).fp8.value == 5.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_cuda_there_is_no_gpu() -> None:
    assert gpu.probe_gpus(TINY) == ((), [])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU: rates not measured on one")
def test_with_cuda_every_gpu_has_rates() -> None:
    gpus, found = gpu.probe_gpus(Effort(2, 1, 1, (1,), 24, 8 << 20))
    assert len(gpus) == torch.cuda.device_count()
    assert all(each.rates is not None and each.rates.h2d.value > 1e8 for each in gpus)
    assert found
