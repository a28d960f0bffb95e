"""Decode over CPU and played GPUs with the CPU's steps in one native program: the same bits as step
by step and the same tokens as on the CPU alone, whatever the timing; and faults.
"""

from __future__ import annotations

import ctypes
import os
import re
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoints import prompt
from played import executor
from split_plans import DUAL, STREAM, split_plan

from hmc.compiler import compile as compile_plan
from hmc.errors import ExecutionError, MachineError, WorkerError
from hmc.plan import Step
from hmc.runtime.device_ops import DEVICE_OPS
from hmc.runtime.device_ops.shares import Call
from hmc.runtime.devices.flags import Flags
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.devices.worker import Worker
from hmc.runtime.executor import Executor
from hmc.runtime.host.lowering import Lowering
from hmc.runtime.host.trace import chrome_trace
from hmc.runtime.phases.phase import DevicePhase
from hmc.runtime.schedule.crossing import crossing
from hmc.runtime.schedule.host_program import HostProgram
from hmc.runtime.schedule.runner import ScheduleRunner

Checkpoint = Callable[..., Path]
Floats = npt.NDArray[np.float32]

CASES = [("qwen3_moe", "fp8"), ("mixtral", "bf16"), ("deepseek_v3", "fp8")] + [
    pytest.param(family, quant, marks=pytest.mark.slow)
    for family, quant in (("qwen3_moe", "bf16"), ("mixtral", "fp8"), ("deepseek_v3", "bf16"))
]
_SLOW = [
    pytest.param(family, quant, marks=pytest.mark.slow)
    for family, quant in (("mixtral", "bf16"), ("deepseek_v3", "fp8"), ("deepseek_v3", "bf16"))
]
BATCH, STEPS = 3, 4
ALL_SEEDS = int(os.environ.get("HMC_TEST_SEEDS", "150"))
SEEDS, CALLS = max(2, ALL_SEEDS // 50), max(100, ALL_SEEDS)
"""Delay patterns of every family and phase (give HMC_TEST_SEEDS=1000 to search)."""


def phase_of(found: Executor, name: str) -> DevicePhase:
    phase = found.phases[name]
    assert isinstance(phase, DevicePhase)
    return phase


def program_of(phase: DevicePhase, backend: HostBackend) -> HostProgram:
    across = crossing(phase.bound.phase)
    assert across is not None
    return phase.bound.program(across, backend.flags(len(across.flags)))


def calls(found: Executor, phase: DevicePhase) -> list[Call]:
    """A few decode steps of sequences of different lengths, with given tokens."""
    sequences = [found.open() for _ in range(BATCH)]
    for number, sequence in enumerate(sequences):
        list(found.prefill(sequence, np.array(prompt(5 + 3 * number, number), np.int32)))
        found.kv.reserve(sequence, 5 + 3 * number + STEPS)
    rows = np.array([sequence.row for sequence in sequences], np.int32)
    wanted = np.arange(BATCH, dtype=np.int32)
    return [
        phase.bound.call(
            np.array(prompt(BATCH, 40 + step), np.int32), 5 + 3 * wanted + step, rows, wanted
        )
        for step in range(STEPS)
    ]


def answer(found: Executor, ids: list[int], tokens: int, phase: str) -> tuple[list[int], Floats]:
    """Greedy tokens of one sequence, and all logits that gave them."""
    sequence = found.open()
    *_, logits = found.prefill(sequence, np.array(ids, np.int32), phase="prefill.host")
    seen = [logits[-1].copy()]
    while len(seen) < tokens:
        token = np.array([seen[-1].argmax()], np.int32)
        seen.append(found.decode([sequence], token, phase)[0].copy())
    found.release(sequence)
    return [int(each.argmax()) for each in seen], np.stack(seen)


@pytest.mark.few(1)
@pytest.mark.parametrize(("family", "quant"), CASES)
def test_one_program_gives_the_bits_of_single_steps_whatever_the_timing(
    family: str, quant: str, checkpoint: Checkpoint
) -> None:
    directory = checkpoint(family, quant)
    with executor(split_plan(directory, held=0.4), directory) as found:
        for name in ("decode", DUAL):
            phase = phase_of(found, name)
            bound = phase.bound
            steps = calls(found, phase)
            split = [s for s in bound.phase.steps if s.resource == "cpu" and "range" in s.attrs]
            assert split  # some experts of a layer here, some there
            backend = HostBackend(1, 1 << 30)
            alone = ScheduleRunner(bound.phase, backend, bound.works)
            expected = []
            for call in steps:
                alone.run_untimed(call)
                expected.append(bound.logits(call).copy())
            backend.close()
            for seed in range(SEEDS):
                backend = HostBackend(1, 1 << 30, delays=seed)
                program = program_of(phase, backend)
                runner = ScheduleRunner(bound.phase, backend, bound.works, program=program)
                for call, wanted in zip(steps, expected, strict=True):
                    runner.run_untimed(call)
                    assert np.array_equal(bound.logits(call), wanted), f"{name}, seed {seed}"
                assert program.flags.epoch == STEPS
                backend.close()


@pytest.mark.slow
@pytest.mark.parametrize(("family", "quant"), [CASES[0], *_SLOW])
def test_tokens_are_the_cpu_plans(family: str, quant: str, checkpoint: Checkpoint) -> None:
    directory = checkpoint(family, quant)
    cpu_plan = compile_plan(directory, max_context=256, max_chunk=64, threads=2)
    prompts = [prompt(9, seed) for seed in (1, 2, 3)]
    with executor(cpu_plan, directory) as cpu:
        expected = [answer(cpu, ids, 8, "decode") for ids in prompts]
    same, first = 0, None
    for delays in (1, 2):
        with executor(split_plan(directory, held=0.4), directory, delays=delays) as found:
            assert phase_of(found, "decode").program is not None
            answers = [answer(found, ids, 8, "decode") for ids in prompts]
        given = np.stack([logits for _, logits in answers])
        first = given if first is None else first
        assert np.array_equal(given, first)  # what differs from the CPU's is no matter of timing
        for (mine, others), (tokens, logits) in zip(answers, expected, strict=True):
            agree = next((n for n in range(8) if mine[n] != tokens[n]), 8)
            same += agree == 8
            if agree < 8:  # only where rounding decides between two tokens
                best = np.sort(logits[agree])[-2:]
                assert best[1] - best[0] < 0.03 * np.linalg.norm(logits[agree])
            if agree:  # of one row alone a router that flips would decide
                near = np.linalg.norm(others[:agree] - logits[:agree], axis=1)
                assert np.median(near / np.linalg.norm(logits[:agree], axis=1)) < 0.03
    assert same >= 4


@pytest.mark.slow
def test_text_is_the_cpu_plans() -> None:
    directory = Path(__file__).parents[2] / "examples" / "tiny-kjv"
    ids = [0, 5, 17, 300, 22]
    with executor(compile_plan(directory, max_context=256, threads=2), directory) as cpu:
        expected, _ = answer(cpu, ids, 16, "decode")
    for delays in (None, 3):
        with executor(split_plan(directory), directory, delays=delays) as found:
            assert answer(found, ids, 16, "decode")[0] == expected


def test_a_batch_too_small_for_two_lanes_goes_step_by_step(checkpoint: Checkpoint) -> None:
    directory = checkpoint("mixtral", "bf16")
    with executor(split_plan(directory), directory) as found:
        assert (
            answer(found, prompt(5, 1), 5, DUAL)[0] == answer(found, prompt(5, 1), 5, "decode")[0]
        )
        program = phase_of(found, DUAL).program
        assert program is not None
        assert program.flags.epoch == 0


def test_the_words_say_how_cpu_and_gpus_meet(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    plan = split_plan(directory)
    with executor(plan, directory) as found:
        assert phase_of(found, STREAM).program is None
        assert re.search(r"decode: 2 CPU steps in one native program, \d+ flags", found.handover)
        expected = answer(found, prompt(5, 1), 5, "decode")[0]

    def refuse(self: HostBackend, count: int) -> Flags:
        raise MachineError("no stream can wait for memory")

    monkeypatch.setattr(HostBackend, "flags", refuse)
    with executor(plan, directory) as found:
        assert "decode: CPU and GPUs wait for each other in Python, for no stream" in found.handover
        assert answer(found, prompt(5, 1), 5, "decode")[0] == expected


@pytest.mark.slow
def test_a_trace_shows_the_steps_of_the_program(checkpoint: Checkpoint) -> None:
    directory = checkpoint("deepseek_v3", "bf16")
    plan = split_plan(directory)
    with executor(plan, directory) as found:
        with found.recorded() as recorder:
            answer(found, prompt(5, 1), 4, "decode")
        phase = phase_of(found, "decode")
        assert phase.program is not None
        assert phase.program.flags.epoch == 3
        assert phase.last is not None
        spans = list(zip(phase.last.start, phase.last.finish, strict=True))
        steps = plan.phase("decode").steps
        signalled = {step.signal: at for at, step in enumerate(steps) if step.signal >= 0}
        for at, step in enumerate(steps):
            assert 0 <= spans[at][0] <= spans[at][1] < 10
            for event in step.waits:
                assert spans[signalled[event]][1] <= spans[at][0] + 1e-4
        assert set(recorder.with_python("decode")) == {step.id for step in steps}
        shown = {event["name"] for event in chrome_trace(plan, recorder)["traceEvents"]}
        assert {"wait for a device", "experts", "embed"} <= shown


@pytest.mark.slow
def test_many_calls_and_an_idle_engine(checkpoint: Checkpoint) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    with executor(split_plan(directory), directory, threads=1) as found:
        phase = phase_of(found, "decode")
        steps = calls(found, phase)
        bound = phase.bound
        expected: list[Floats] = []
        for number in range(CALLS):
            call = steps[number % STEPS]
            phase.runner.run_untimed(call)
            if number < STEPS:
                expected.append(bound.logits(call).copy())
            assert np.array_equal(bound.logits(call), expected[number % STEPS])
        assert phase.program is not None
        assert phase.program.flags.epoch == CALLS
        time.sleep(0.05)
        before = time.process_time()
        time.sleep(0.5)
        assert time.process_time() - before < 0.05


# -- faults ----------------------------------------------------------------------------------------


def streams() -> list[str]:
    names = [thread.name for thread in threading.enumerate()]
    return [name for name in names if re.fullmatch(r"hmc-(cpu|link|(gpu|h2d|d2h)\d+)", name)]


@pytest.mark.parametrize("by", ["a device", "the CPU"])
def test_a_dropped_flag_ends_in_an_error_in_time(
    by: str, checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    with executor(split_plan(directory), directory) as found:
        phase = phase_of(found, "decode")
        bound, (call, *_) = phase.bound, calls(found, phase)
        across = crossing(bound.phase)
        assert across is not None
        theirs = [
            across.flags[step.signal]
            for step in bound.phase.steps
            if (step.id in across.steps) == (by == "the CPU") and step.signal in across.flags
        ]
        for dropped in (theirs[0], theirs[-1]):
            kind: Any = Worker if by == "a device" else Lowering
            place = 2 if by == "a device" else 3
            original = kind.set_flag

            def lossy(*arguments: Any, drop: int = dropped, at: int = place) -> None:
                if arguments[at] != drop:
                    original(*arguments)  # noqa: B023

            with monkeypatch.context() as patched:
                patched.setattr(kind, "set_flag", lossy)
                backend = HostBackend(1, 1 << 30, timeout=0.4)
                program = program_of(phase, backend)
                runner = ScheduleRunner(bound.phase, backend, bound.works, program=program)
                start = time.monotonic()
                where = "CPU's steps in one program" if by == "a device" else "waits for flag"
                with pytest.raises(WorkerError, match=where):
                    runner.run_untimed(call)
            assert time.monotonic() - start < 5
            assert ctypes.c_uint32.from_address(program.flags.abort_address).value
        # the pool has survived
        assert len(answer(found, prompt(5, 1), 3, "decode")[0]) == 3
    assert not streams()


def test_a_device_that_raises_while_workers_wait_ends_everything(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    make = DEVICE_OPS["attention"]
    armed = [False]

    def made(bound: Any, step: Step) -> Callable[[Any], None]:
        work = make(bound, step)

        def broken(call: Any) -> None:
            if armed[0] and step.layer == 1:
                time.sleep(0.05)  # the CPU waits already
                raise ValueError("a bad step")
            work(call)

        return broken

    monkeypatch.setitem(DEVICE_OPS, "attention", made)
    with executor(split_plan(directory), directory) as found:
        sequence = found.open()
        list(found.prefill(sequence, np.array(prompt(5, 1), np.int32), phase="prefill.host"))
        token = np.array([3], np.int32)
        found.decode([sequence], token, "decode")
        armed[0] = True
        start = time.monotonic()
        with pytest.raises(ExecutionError, match=r"phase decode, step .*ValueError: a bad step"):
            found.decode([sequence], token, "decode")
        with pytest.raises(ExecutionError):
            found.decode([sequence], token, "decode")
        program = phase_of(found, "decode").program
        assert program is not None
        assert ctypes.c_uint32.from_address(program.flags.abort_address).value
        assert not found.pool.run(program.program.records)  # workers are there, and end it again
    assert time.monotonic() - start < 5
    assert not streams()


def test_a_step_of_some_rows_that_reads_inputs_is_refused(checkpoint: Checkpoint) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    with executor(split_plan(directory), directory) as found:
        bound = phase_of(found, DUAL).bound
        across = crossing(bound.phase)
        assert across is not None
        lane = bound.share(next(step for step in bound.phase.steps if step.op == "experts"))
        embed = next(step for step in bound.phase.steps if step.op == "embed")
        wrong = replace(across, steps=across.steps | {embed.id})
        with pytest.raises(ExecutionError, match="reads inputs of a part of the call"):
            bound._host.program(
                wrong, Flags(len(across.flags)), {step.id: lane for step in bound.phase.steps}
            )
