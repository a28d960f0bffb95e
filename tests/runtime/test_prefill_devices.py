"""A prompt on the devices beside decoding: the tokens of both are those of each alone, decode steps
go on meanwhile, and everything ends cleanly whatever is cancelled, fails or hangs.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import prompt
from paged_fake import WAIT, request, tokens_of
from played import delayed
from split_plans import BESIDE, STREAM, split_plan

from hmc.errors import ExecutionError
from hmc.plan import Plan
from hmc.plan.phases import DECODE, PREFILL
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.device_ops import DEVICE_OPS
from hmc.runtime.executor import Executor
from hmc.runtime.phases.beside import DevicePrefill
from hmc.runtime.tokens.requests import Request, Ticket

SHORT, LONG = prompt(9, 1), prompt(80, 2)
CALL = 48
"""Tokens that one call of `prefill.beside` takes here: the long prompt needs two."""


class Gate:
    """What the last step of each layer of a prompt beside does first: wait while it is `shut`, and
    raise `fault`; `reached` says that one has come here."""

    def __init__(self) -> None:
        self.fault: Exception | None = None
        self.reached = threading.Event()
        self._open = threading.Event()
        self._open.set()

    def shut(self) -> None:
        self.reached.clear()
        self._open.clear()

    def open(self) -> None:
        self._open.set()

    def slow(self, update: Any) -> None:
        """A listener of who decodes: no hurry to the end of its answer while the gate is shut."""
        if not self._open.is_set():
            time.sleep(0.05)

    def __call__(self) -> None:
        self.reached.set()
        self._open.wait(WAIT)
        if self.fault is not None:
            raise self.fault


@pytest.fixture(scope="module")
def gate() -> Gate:
    return Gate()


@pytest.fixture(scope="module")
def plan(checkpoint: Callable[..., Path]) -> Plan:
    """Two GPUs; prompts of 16 tokens stream, every batch decodes in one lane."""
    found = split_plan(checkpoint("mixtral", "bf16", layers=2), gpus=2, switches=True)
    assert {each.name for each in found.phases} >= {BESIDE, STREAM, DECODE}
    phases = tuple(
        each.model_copy(update={"max_tokens": CALL}) if each.name == BESIDE else each
        for each in found.phases
    )
    switches = tuple(each for each in found.switches if each.kind == "prefill")
    return found.model_copy(update={"phases": phases, "switches": switches})


@pytest.fixture
def executor(plan: Plan, gate: Gate, monkeypatch: pytest.MonkeyPatch) -> Iterator[Executor]:
    """With the gate in the step `kv_in`, which no other phase has."""
    make = DEVICE_OPS["kv_in"]

    def gated(bound: Any, step: Any) -> Callable[[Any], None]:
        work = make(bound, step)

        def both(call: Any) -> None:
            gate()
            work(call)

        return both

    monkeypatch.setitem(DEVICE_OPS, "kv_in", gated)
    found = Executor(plan, Path(plan.checkpoint.path), threads=1, devices=delayed(plan, 3))
    try:
        yield found
    finally:
        gate.fault = None
        gate.open()
        found.close()
    assert not [each.name for each in threading.enumerate() if each.name.startswith("hmc-prompt")]


def beside_of(executor: Executor) -> DevicePrefill:
    assert executor.beside is not None
    return executor.beside


def answer(executor: Executor, ids: list[int], new: int, phase: str) -> list[int]:
    """Greedy tokens of one sequence, its prompt computed by a phase."""
    sequence = executor.open()
    *_, logits = executor.prefill(sequence, np.array(ids, np.int32), phase=phase)
    tokens = [int(logits[-1].argmax())]
    while len(tokens) < new:
        logits = executor.decode([sequence], np.array(tokens[-1:], np.int32))
        tokens.append(int(logits[0].argmax()))
    executor.release(sequence)
    return tokens


def ask(ids: list[int], new: int, **options: Any) -> Request:
    return request(ids, new, eos=(), sampling={"temperature": 0}, **options)  # type: ignore[no-any-return, no-untyped-call]


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.001)


# -- the executor ----------------------------------------------------------------------------------


def test_a_prompt_and_decode_steps_run_at_the_same_time(executor: Executor, gate: Gate) -> None:
    alone = answer(executor, SHORT, 8, PREFILL), answer(executor, LONG, 4, BESIDE)
    short, long = executor.open(), executor.open()
    *_, logits = executor.prefill(short, np.array(SHORT, np.int32))
    tokens = [int(logits[-1].argmax())]

    def decode(wanted: int) -> None:
        while len(tokens) < wanted:
            logits = executor.decode([short], np.array(tokens[-1:], np.int32))
            tokens.append(int(logits[0].argmax()))

    executor.kv.reserve(long, len(LONG) + 4)
    with executor.recorded() as recorder:
        gate.shut()
        job = beside_of(executor).start(long, np.array(LONG, np.int32))
        assert gate.reached.wait(WAIT)
        decode(6)  # though the prompt's copy to gpu0 hangs
        assert (job.logits, job.tokens, job.over) == (None, 0, False)
        with pytest.raises(ExecutionError, match="they take one at a time"):
            executor.append(short, np.array(SHORT, np.int32), np.zeros(1, np.int32), STREAM)
        with pytest.raises(ExecutionError, match="they take one at a time"):
            beside_of(executor).start(long, np.array(LONG, np.int32))
        gate.open()
        until(lambda: job.over)
        logits = job.logits
        assert logits is not None and job.over and job.tokens == len(LONG)
        decode(8)
    long.length += len(LONG)
    assert tokens == alone[0]
    last = [int(logits.argmax())]
    while len(last) < 4:
        found = executor.decode([long], np.array(last[-1:], np.int32))
        last.append(int(found[0].argmax()))
    assert last == alone[1]

    beside = next(run for run in recorder.schedules if run.phase == BESIDE)
    inside = [
        run
        for run in recorder.schedules
        if run.phase == DECODE
        and min(beside.start) < min(run.start) <= max(run.stop) < max(beside.stop)
    ]
    assert len(inside) == 5
    used = [{step.resource for step in run.steps} for run in (beside, inside[0])]
    assert "gpu1" in used[0] and "gpu0" not in used[0] and {"gpu0", "cpu"} <= used[1]


def test_closing_ends_a_prompt_under_way(executor: Executor, gate: Gate) -> None:
    sequence = executor.open()
    executor.kv.reserve(sequence, len(LONG))
    gate.shut()
    job = beside_of(executor).start(sequence, np.array(LONG, np.int32))
    assert gate.reached.wait(WAIT)
    threading.Timer(0.05, gate.open).start()
    executor.close()
    assert job.over
    assert "cancelled" in str(job.error)


# -- the scheduler ---------------------------------------------------------------------------------


@pytest.fixture
def served(executor: Executor) -> Iterator[tuple[Executor, Scheduler]]:
    with Scheduler(executor) as scheduler:
        yield executor, scheduler
    assert executor.kv.allocator.used == 0
    assert executor.kv.rows_free == executor.plan.limits.max_batch


def both(scheduler: Scheduler, gate: Gate, short: int = 200, long: int = 6) -> list[Ticket]:
    """A request that decodes and, at the gate, a long prompt beside it."""
    gate.shut()
    first = scheduler.submit(ask(SHORT, short, listener=gate.slow))
    second = scheduler.submit(ask(LONG, long))
    assert gate.reached.wait(WAIT)
    return [first, second]


def decoded(executor: Executor) -> int:
    return executor.calls[DECODE]


@pytest.mark.slow
def test_the_scheduler_goes_on_decoding_while_a_prompt_streams(
    served: tuple[Executor, Scheduler], gate: Gate
) -> None:
    executor, scheduler = served
    alone = answer(executor, SHORT, 30, PREFILL), answer(executor, LONG, 6, BESIDE)
    streamed = answer(executor, LONG[::-1], 3, STREAM)
    after = answer(executor, LONG[:40], 1, STREAM)
    executor.calls.clear()
    first, second = both(scheduler, gate, short=30)
    aside = scheduler.submit(ask(SHORT, 1))  # in a chunk, which has memory of its own
    assert tokens_of(aside) == alone[0][:1]
    behind = scheduler.submit(ask(LONG[:40], 1))  # prompts that stream come one at a time
    before = decoded(executor)
    until(lambda: decoded(executor) > before + 5)
    stats = scheduler.stats()
    assert (stats.running, stats.prefilling, stats.waiting) == (1, 2, 0)
    assert 0 < scheduler.stuck_for < WAIT
    assert stats.prefill is None
    gate.open()
    assert tokens_of(first) == alone[0]
    assert tokens_of(second) == alone[1]
    assert tokens_of(behind) == after
    assert executor.calls[BESIDE] >= 2
    until(lambda: scheduler.stats().running == 0)
    assert tokens_of(scheduler.submit(ask(LONG[::-1], 3))) == streamed  # nobody decodes: all GPUs
    assert executor.calls[STREAM] == 1
    assert scheduler.stuck_for == 0


def test_a_cancelled_prompt_frees_its_blocks_when_its_call_is_over(
    served: tuple[Executor, Scheduler], gate: Gate
) -> None:
    executor, scheduler = served
    first, second = both(scheduler, gate)
    held = executor.kv.allocator.used
    second.cancel()
    assert tokens_of(second) == []
    assert second.result().finish_reason == "cancelled"
    before = decoded(executor)
    until(lambda: decoded(executor) > before + 2)
    assert executor.kv.allocator.used == held  # the call still writes there
    gate.open()
    until(lambda: executor.kv.allocator.used < held)
    assert executor.calls[BESIDE] == 1  # not the second one
    third = scheduler.submit(ask(LONG, 1))
    assert tokens_of(third)
    first.cancel()
    assert first.wait(WAIT)


def test_closing_the_scheduler_waits_for_the_call(executor: Executor, gate: Gate) -> None:
    scheduler = Scheduler(executor)
    scheduler.start()
    tickets = both(scheduler, gate)
    threading.Timer(0.1, gate.open).start()
    scheduler.close()
    assert [each.result().finish_reason for each in tickets] == ["cancelled"] * 2
    assert scheduler.failure is None
    assert executor.kv.allocator.used == 0


def test_a_fault_on_a_device_ends_everybody_with_its_error(executor: Executor, gate: Gate) -> None:
    said = r"phase prefill\.beside, step \d+ \(kv_in.*failed on h2d0\.aside: ValueError: no way"
    with Scheduler(executor) as scheduler:
        tickets = both(scheduler, gate)
        gate.fault = ValueError("no way")
        gate.open()
        for ticket in tickets:
            with pytest.raises(ExecutionError, match=said):
                tokens_of(ticket)
        until(lambda: scheduler.failure is not None)
        with pytest.raises(ExecutionError, match="has stopped"):
            scheduler.submit(ask(SHORT, 1))
    assert executor.kv.allocator.used == 0


def test_a_fault_in_decode_ends_the_prompt_beside_too(
    executor: Executor, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = ExecutionError("gpu0 is gone")

    def broken(*arguments: Any) -> npt.NDArray[np.float32]:
        executor.phases[DECODE].runner._backend.close(error)  # type: ignore[union-attr]
        raise error

    with Scheduler(executor) as scheduler:
        tickets = both(scheduler, gate)
        threading.Timer(0.1, gate.open).start()
        monkeypatch.setattr(executor, "decode", broken)
        for ticket in tickets:
            with pytest.raises(ExecutionError, match="gpu0 is gone"):
                tokens_of(ticket)
    assert executor.kv.allocator.used == 0


def test_what_is_wrong_with_one_prompt_ends_it_alone(
    served: tuple[Executor, Scheduler], monkeypatch: pytest.MonkeyPatch
) -> None:
    executor, scheduler = served

    def refused(*arguments: Any) -> None:
        raise ZeroDivisionError("by nothing")

    with monkeypatch.context() as patched:
        patched.setattr(beside_of(executor), "_call", refused)
        first = scheduler.submit(ask(SHORT, 20))
        with pytest.raises(ExecutionError, match="prompt beside failed: ZeroDivisionError"):
            tokens_of(scheduler.submit(ask(LONG, 6)))
    assert len(tokens_of(scheduler.submit(ask(LONG, 2)))) == 2
    assert len(tokens_of(first)) == 20
