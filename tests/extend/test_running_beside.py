"""States a sequence and a prefill process: it changes them where they lie, leaves snapshots of them
in slots that it was lent, and may die half way.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from paged_fake import WAIT, tokens_of
from running import registered
from running_model import built, ids_of, request, write

import hmc
from hmc.plan.phases import PREFILL
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.prefill import worker
from hmc.runtime.prefill.disaggregation import Disaggregated, Division, decide

CHUNK = 64
CPUS = tuple(sorted(os.sched_getaffinity(0)))
CHILD = Path(__file__).with_name("running_child.py")


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Disaggregated]:
    directory = tmp_path_factory.mktemp("running_beside")
    with pytest.MonkeyPatch.context() as patched, registered():
        patched.setattr(worker, "_COMMAND", (sys.executable, str(CHILD)))
        write(directory)
        plan = built(hmc.compile(directory, max_context=1024, max_chunk=CHUNK, threads=2))
        assert decide(plan, "on", machine=None, threads=2).division is not None
        with Disaggregated(plan, division=Division(CPUS[:1], CPUS[-1:])) as found:
            assert found.worker is not None and found.worker.wait_ready(WAIT)
            yield found


@pytest.fixture
def scheduler(both: Disaggregated) -> Iterator[Scheduler]:
    kv = both.engine.executor.kv
    with Scheduler(both.engine.executor, prefill=both.worker) as found:
        yield found
    assert kv.allocator.used == 0 and kv.rows_free == both.engine.plan.limits.max_batch
    assert len(kv.snapshots) + kv.snapshots.free == kv.layout.snapshots


def alone(both: Disaggregated, ids: list[int], new: int) -> list[int]:
    return list(both.engine.generate(ids, max_new_tokens=new, temperature=0).token_ids)


def until(condition: Callable[[], object]) -> None:
    limit = time.monotonic() + WAIT
    while not condition():
        assert time.monotonic() < limit
        time.sleep(0.001)


def test_prompts_go_on_from_what_the_process_left(
    both: Disaggregated, scheduler: Scheduler
) -> None:
    head = ids_of(700, 1)
    asked = [head + ids_of(20, 2), head + ids_of(90, 3), head + ids_of(70, 4), ids_of(30, 5)]
    asked += [head[:200] + ids_of(500, 6), head[:200] + ids_of(300, 7), head[:200] + ids_of(8, 8)]
    expected = [alone(both, ids, 6) for ids in asked]
    calls = both.engine.executor.calls
    before, known = calls[PREFILL], []
    for ids, answer in zip(asked, expected, strict=True):
        then = scheduler.stats().prefix_tokens
        assert tokens_of(scheduler.submit(request(ids, 6))) == answer
        known.append(scheduler.stats().prefix_tokens - then)
    # a sparse snapshot of the first prompt, then that where the second one left it
    assert known == [0, 192, 640, 0, 192, 192, 192]
    assert calls[PREFILL] - before < 10  # what is shorter than a chunk is computed here
    tickets = [scheduler.submit(request(ids, 6)) for ids in asked]
    assert [tokens_of(ticket) for ticket in tickets] == expected


@pytest.mark.slow
def test_states_that_a_dead_process_left_are_not_trusted(
    both: Disaggregated, scheduler: Scheduler
) -> None:
    assert both.worker is not None
    kv, beside = both.engine.executor.kv, both.worker
    asked = [ids_of(900, 11), ids_of(640, 12) + ids_of(200, 13)]
    expected = [alone(both, ids, 5) for ids in asked]
    assert tokens_of(scheduler.submit(request(ids_of(640, 12) + ids_of(9, 14), 1)))
    for ids, answer in zip(asked, expected, strict=True):
        until(lambda: beside.ready)
        os.kill(beside.pid, signal.SIGSTOP)
        ticket = scheduler.submit(request(ids, 5))
        until(lambda: scheduler.stats().prefill.total == len(ids))  # noqa: B023
        rows = set(range(kv.layout.sequences)) - set(kv._rows)
        for layer in (0, 1):
            kv.array(layer, "running")[list(rows)] += 1.0
        os.kill(beside.pid, signal.SIGKILL)
        assert tokens_of(ticket) == answer
    ids = ids_of(950, 15)
    answer, restarts = alone(both, ids, 5), beside.restarts
    until(lambda: beside.ready)
    ticket = scheduler.submit(request(ids, 5))
    until(lambda: scheduler.stats().prefill.tokens or ticket.done)
    os.kill(beside.pid, signal.SIGKILL)  # half way, if it is not too fast
    assert tokens_of(ticket) == answer
    until(lambda: beside.restarts > restarts and beside.ready)


def test_a_cancelled_prompt_gives_its_slots_back(both: Disaggregated, scheduler: Scheduler) -> None:
    assert both.worker is not None
    kv, beside = both.engine.executor.kv, both.worker
    until(lambda: beside.ready)
    os.kill(beside.pid, signal.SIGSTOP)
    first, second = (scheduler.submit(request(ids_of(800, seed), 5)) for seed in (21, 22))
    until(lambda: scheduler.stats().prefill.total == 800)
    assert len(kv.snapshots) + kv.snapshots.free < kv.layout.snapshots
    for ticket in (first, second):
        ticket.cancel()
    until(lambda: first.done and second.done)
    os.kill(beside.pid, signal.SIGCONT)
    ids = ids_of(700, 23)
    assert tokens_of(scheduler.submit(request(ids, 5))) == alone_later(both, ids)


def alone_later(both: Disaggregated, ids: list[int]) -> list[int]:
    """The same of a second executor's, since the scheduler has the first."""
    with hmc.Engine(both.engine.plan) as engine:
        return list(engine.generate(ids, max_new_tokens=5, temperature=0).token_ids)


def test_the_process_reads_what_was_known(both: Disaggregated, scheduler: Scheduler) -> None:
    """A prompt that goes on from a snapshot is the process's as well."""
    head = ids_of(320, 31)
    calls, other = both.engine.executor.calls, head + ids_of(300, 33)
    expected = alone(both, other, 4)
    assert tokens_of(scheduler.submit(request([*head, 5], 1)))
    before = calls[PREFILL]
    then = scheduler.stats().prefix_tokens
    assert tokens_of(scheduler.submit(request(other, 4))) == expected
    assert scheduler.stats().prefix_tokens - then == 320 and calls[PREFILL] == before
    assert np.isfinite(both.engine.executor.kv.array(0, "running")).all()
