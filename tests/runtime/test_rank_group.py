"""Processes of ranks: what is counted, what is refused, and how every fault ends in one error."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import faulty_rank
import numpy as np
import pytest
from checkpoints import prompt
from rank_bench import Bench, bench
from split_plans import split_plan

from hmc.errors import CapacityError, ExecutionError, HmcError, UsageError, WorkerError
from hmc.plan import Plan
from hmc.runtime.executor import Executor
from hmc.runtime.ranks.group import RankGroup
from hmc.runtime.weights.store import WeightStore

IDS = np.array(prompt(45), np.int32)


@contextmanager
def faulty(fault: str) -> Iterator[None]:
    """Ranks started meanwhile have the fault."""
    command = (sys.executable, faulty_rank.__file__, fault)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hmc.runtime.ranks.process.COMMAND", command)
        yield


def gone(pids: dict[int, int]) -> None:
    """No process is left, not even unreaped."""
    assert pids
    for pid in pids.values():
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def fails(found: Bench, seconds: float) -> HmcError:
    """The error of a prefill, which ends in time and leaves no process."""
    pids, began = found.group.pids, time.monotonic()
    with pytest.raises(HmcError) as caught:
        found.by_processes(found.kv.open(), IDS)
    assert time.monotonic() - began < seconds
    gone(pids)
    with pytest.raises(HmcError) as again:
        found.by_processes(found.kv.open(), IDS)
    assert str(again.value) == str(caught.value) or "rank 0 failed" in str(again.value)
    return caught.value


def wide(checkpoint: Callable[..., Path]) -> Path:
    """Every token has all 8 experts."""
    sizes = {"num_experts_per_tok": 8, "num_local_experts": 8}
    return checkpoint("mixtral", "bf16", layers=2, **sizes)


def test_bytes_are_exact_and_a_lost_rank_is_named(checkpoint: Callable[..., Path]) -> None:
    """What rank 0 has sent; then a rank that is killed between calls."""
    with bench(wide(checkpoint), 2) as found:
        found.by_processes(found.kv.open(), IDS)
        pieces = [0, 11, 22, 33, 45]  # of 45 tokens: rank 0 has 11 + 12, rank 1 the rest
        shares = [pieces[1] + pieces[4] - pieces[3], pieces[3] - pieces[1]]
        layers, width = found.plan.model.layers, found.plan.model.hidden
        states = {state.name: state.width for _, state in found.plan.kv.each()}
        rows = width + sum(states.values())  # gathered for the experts, and for attention
        exchanged = width * shares[1]
        assert found.group.link.sent == layers * 2 * (rows * max(shares) + exchanged)

        os.kill(found.group.pids[1], signal.SIGKILL)
        with suppress(ChildProcessError):  # who watches it has taken note already
            os.waitid(os.P_PID, found.group.pids[1], os.WEXITED | os.WNOWAIT)
        assert "was killed by signal 9" in str(fails(found, 20))


@pytest.mark.slow
def test_a_rank_that_is_stopped_between_calls(checkpoint: Callable[..., Path]) -> None:
    with bench(wide(checkpoint), 2, seconds=10) as found:  # more than a busy machine takes
        os.kill(found.group.pids[1], signal.SIGSTOP)
        error = fails(found, 40)
        assert "rank 1 (process" in str(error)
        assert "does not answer" in str(error)


@pytest.mark.slow
def test_a_rank_killed_in_the_middle_of_a_prefill(checkpoint: Callable[..., Path]) -> None:
    sizes = {"num_experts_per_tok": 4}
    directory = checkpoint("mixtral", "bf16", layers=2, **sizes)
    with faulty("slow"), bench(directory, 3) as found:
        killer = threading.Timer(0.7, os.kill, (found.group.pids[2], signal.SIGKILL))
        killer.start()
        error = fails(found, 10)
        killer.join()
        assert isinstance(error, WorkerError)
        assert "rank 2 (process" in str(error)
        assert "SIGKILL" in str(error)


@pytest.mark.slow
def test_a_rank_that_raises(checkpoint: Callable[..., Path]) -> None:
    with faulty("raise"), bench(wide(checkpoint), 2) as found:
        error = fails(found, 60)
        assert isinstance(error, ExecutionError)
        assert str(error).startswith("rank 1: ")
        assert "(sort, layer 1) failed on gpu1: ValueError: a fault for a test" in str(error)


@pytest.mark.slow
def test_a_rank_that_hangs(checkpoint: Callable[..., Path]) -> None:
    with faulty("hang"), bench(wide(checkpoint), 2, seconds=2) as found:
        error = fails(found, 11)
        assert isinstance(error, WorkerError)
        assert "rank 1 (process" in str(error)
        assert "(sort, layer 1)" in str(error)


@pytest.mark.slow
def test_a_gpu_without_enough_memory(
    checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = wide(checkpoint)
    plan = split_plan(directory, gpus=2)
    gpus = (plan.machine.gpus[0], plan.machine.gpus[1].model_copy(update={"memory_bytes": 1 << 18}))
    plan = plan.model_copy(update={"machine": plan.machine.model_copy(update={"gpus": gpus})})
    started: list[dict[int, int]] = []

    def opened(*given: Any, **named: Any) -> RankGroup:
        group = RankGroup(*given, **named)
        started.append(group.pids)
        return group

    monkeypatch.setattr("hmc.runtime.phases.phase.RankGroup", opened)
    with pytest.raises(CapacityError, match="gpu1 cannot hold"):
        Executor(plan, directory, devices="host", gpus=2, threads=1)
    gone(started[0])


@pytest.mark.slow
def test_a_gpus_memory_is_there_once(checkpoint: Callable[..., Path]) -> None:
    """The process of a rank works in the memory that rank 0's process has on its GPU."""
    directory = wide(checkpoint)
    with bench(directory, 2) as found:
        (mine,) = found.memory.values()
        region = os.readlink(mine.region.file[0])  # type: ignore[index]
        first = found.by_processes(found.kv.open(), IDS)
        maps = Path(f"/proc/{found.group.pids[1]}/maps").read_text()
        files = [os.readlink(lent.file[0]) for lent in mine.experts.values()]  # type: ignore[index]
        assert files and all(each.removesuffix(" (deleted)") in maps for each in (region, *files))
        # what the rank reads of its experts is what rank 0 holds: spoilt there, spoilt here
        found.spoil(1)
        again = found.by_processes(found.kv.open(), IDS)
        assert not np.array_equal(first, again)


@pytest.mark.slow
def test_closing_ends_the_processes_before_they_are_ready(checkpoint: Callable[..., Path]) -> None:
    directory = wide(checkpoint)
    with shared(split_plan(directory, gpus=2), directory) as group:
        pids = group.pids
    gone(pids)


def test_what_cannot_be_shared_is_refused(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    store = WeightStore.open(split_plan(directory, gpus=2), directory)

    def refused(plan: Plan, words: str, weights: WeightStore = store) -> None:
        with pytest.raises(UsageError, match=words):
            RankGroup(plan, "host", store=weights, directory=directory, threads=1)

    plan = split_plan(directory, gpus=2)
    refused(split_plan(directory, gpus=4), "4 ranks, but a token has 2 experts")
    dummy = WeightStore.open(plan, None, dummy=True)
    refused(plan, "private memory cannot be shared", dummy)
    dummy.close()
    store.close()


@contextmanager
def shared(plan: Plan, directory: Path) -> Iterator[RankGroup]:
    """The ranks of a plan, without rank 0's part."""
    store = WeightStore.open(plan, directory)
    with RankGroup(plan, "host", store=store, directory=directory, threads=1) as group:
        yield group
    store.close()
