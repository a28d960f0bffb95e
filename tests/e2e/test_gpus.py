"""`gpus=N` and `--gpus N`: a process for each GPU behind the engine and the command line."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from checkpoints import prompt
from split_plans import STREAM, split_plan

from hmc.cli import main
from hmc.errors import UsageError, WorkerError
from hmc.plan import Plan, save_plan
from hmc.runtime.engine import Engine
from hmc.runtime.phases.phase import DevicePhase
from hmc.runtime.ranks.group import GroupRunner

LONG = prompt(40, 3)


@pytest.fixture(scope="module")
def plan(checkpoint: Callable[..., Path]) -> Plan:
    """Prompts of 16 tokens are shared between two GPUs."""
    directory = checkpoint("mixtral", "bf16", layers=2, with_tokenizer=True)
    return split_plan(directory, gpus=2, switches=True)


def pids_of(engine: Engine) -> list[int]:
    """The processes of the other ranks."""
    phase = engine.executor.phases[STREAM]
    assert isinstance(phase, DevicePhase)
    assert isinstance(phase.runner, GroupRunner)
    return list(phase.runner.group.pids.values())


def assert_gone(pids: list[int]) -> None:
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_processes_give_what_one_process_gives(plan: Plan) -> None:
    found = []
    for gpus in (None, 2):
        with Engine(plan, threads=1, devices="host", gpus=gpus) as engine:
            pids = [] if gpus is None else pids_of(engine)
            assert len(pids) == (gpus or 1) - 1
            tokens = engine.generate(LONG, max_new_tokens=8, temperature=0).token_ids
            assert engine.executor.calls[STREAM] == 1
            sequence = engine.executor.open()
            *_, logits = engine.executor.prefill(sequence, np.array(LONG, np.int32))
            found.append((tokens, logits.copy()))
        assert_gone(pids)
    np.testing.assert_array_equal(found[0][1], found[1][1])
    assert found[0][0] == found[1][0]


@pytest.mark.slow
def test_a_killed_rank_is_one_error_and_leaves_no_process(plan: Plan) -> None:
    with Engine(plan, threads=1, devices="host", gpus=2) as engine:
        pids = pids_of(engine)
        short = engine.generate(LONG[:5], max_new_tokens=3, temperature=0).token_ids
        os.kill(pids[0], signal.SIGKILL)
        with suppress(ChildProcessError):  # who watches it may have reaped it already
            os.waitid(os.P_PID, pids[0], os.WEXITED | os.WNOWAIT)
        for _ in range(2):
            with pytest.raises(WorkerError, match=rf"^rank 1 \(process {pids[0]}\) was killed by"):
                engine.generate(LONG, max_new_tokens=1)
            assert_gone(pids)
        # what needs no other rank goes on
        assert engine.generate(LONG[:5], max_new_tokens=3, temperature=0).token_ids == short


def test_another_number_of_gpus_is_refused(plan: Plan, checkpoint: Callable[..., Path]) -> None:
    one = split_plan(checkpoint("mixtral", "bf16"), gpus=1)
    none = one.model_copy(update={"machine": one.machine.model_copy(update={"gpus": ()})})
    for given, gpus, words in (
        (plan, 0, "shares prompts between 2 GPUs: give --gpus 2"),
        (plan, 1, "shares prompts between 2 GPUs: give --gpus 2"),
        (one, 2, "gives every prompt to one GPU: give --gpus 1"),
        (none, 1, "uses no GPU, or compile one for a machine with 1"),
    ):
        with pytest.raises(UsageError, match=f"^--gpus {gpus}: the plan for test {words}"):
            Engine(given, threads=1, devices="host", gpus=gpus)
    for options in ({"home": "arena"}, {"dummy_weights": True}):
        with pytest.raises(UsageError, match="give --home shared"):
            Engine(plan, threads=1, devices="host", gpus=2, **options)


@pytest.mark.slow
@pytest.mark.parametrize("home", ["mapped", pytest.param("shared", marks=pytest.mark.slow)])
def test_the_command_line(
    home: str, plan: Plan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.hmp"
    save_plan(plan, path)
    ids = ",".join(map(str, LONG))
    common = ["run", str(path), "--ids", ids, "-n", "2", "--devices", "host", "--threads", "1"]
    with pytest.raises(SystemExit) as stopped:
        main([*common, "--gpus", "2", "--home", home, "--json"])
    out, err = capfd.readouterr()
    assert not stopped.value.code, err
    assert json.loads(out)["phases"] == {STREAM: 1, "decode": 1}

    with pytest.raises(SystemExit) as stopped:
        main([*common, "--gpus", "3"])
    out, err = capfd.readouterr()
    assert stopped.value.code == 2
    assert err == (
        "hmc: error: --gpus 3: the plan for test shares prompts between 2 GPUs: give --gpus 2, or"
        " compile one for a machine with 3\n"
    )
    assert out == ""


@pytest.mark.slow
def test_bench_takes_the_processes_too(
    plan: Plan, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "plan.hmp"
    save_plan(plan, path)
    with pytest.raises(SystemExit) as stopped:
        main(
            f"bench {path} -p 32 -n 0 --repetitions 1 --megabytes 1 --devices host --threads 1"
            " --gpus 2 --dummy-weights --home shared --json".split()
        )
    out, err = capfd.readouterr()
    assert not stopped.value.code, err
    assert STREAM in json.loads(out)["phases"]
