"""Plans for GPUs run by the executor on played ones: the CPU plan's logits whatever the streams'
timing, the phases that the policy chooses, what is seen of them, and faults.
"""

from __future__ import annotations

import gc
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from checkpoints import prompt
from dealt import dealt
from hybrid_plans import waits_of, with_memory, with_phase, without_wait
from played import executor
from split_plans import BESIDE, DUAL, STREAM, split_plan

from hmc.compiler import compile as compile_plan
from hmc.errors import (
    CapacityError,
    ExecutionError,
    HmcError,
    MachineError,
    UsageError,
    VerifyError,
    WorkerError,
)
from hmc.plan import file as planfile
from hmc.plan import load_plan
from hmc.plan.phases import PREFILL, decode_phase, prefill_phase
from hmc.runtime.device_ops import DEVICE_OPS
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.executor import Executor
from hmc.runtime.host.trace import chrome_trace
from hmc.runtime.phases.phase import DevicePhase, open_devices
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.schedule.runner import Measured, ScheduleRunner

Checkpoint = Callable[..., Path]
Floats = npt.NDArray[np.float32]

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
ROWS, TOKENS, LENGTH = 8, 32, 16
ALL_SEEDS = int(os.environ.get("HMC_TEST_SEEDS", "150"))
SEEDS, MORE_SEEDS = max(2, ALL_SEEDS // 63), max(2, ALL_SEEDS // 3)
"""Delay patterns of each of the 21 cases of every family, and of each of 2 of a small model:
together about as many as HMC_TEST_SEEDS says (give 1000 to search)."""


def ids_of(length: int, seed: int = 1) -> npt.NDArray[np.int32]:
    return np.array(prompt(length, seed), np.int32)


def last_rows(found: Executor, ids: npt.NDArray[np.int32], phase: str) -> Floats:
    """Logits of the last tokens of a prompt, computed in one call."""
    sequence = found.open()
    rows = np.arange(len(ids) - ROWS, len(ids), dtype=np.int32)
    logits = found.append(sequence, ids, rows, phase).copy()
    found.release(sequence)
    return logits


def answer(found: Executor, ids: list[int], tokens: int, **phases: str) -> list[int]:
    """Greedy tokens of one sequence."""
    sequence = found.open()
    *_, logits = found.prefill(sequence, np.array(ids, np.int32), phase=phases.get("prefill", ""))
    result = [int(logits[-1].argmax())]
    while len(result) < tokens:
        token = np.array(result[-1:], np.int32)
        logits = found.decode([sequence], token, phases.get("decode", ""))
        result.append(int(logits[0].argmax()))
    found.release(sequence)
    return result


def device_phase(found: Executor, name: str) -> DevicePhase:
    phase = found.phases[name]
    assert isinstance(phase, DevicePhase)
    return phase


def threads() -> list[str]:
    return [each.name for each in threading.enumerate() if each.name.startswith("hmc-")]


# -- what is computed ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def expected(checkpoint: Checkpoint) -> Callable[[str, str], list[Floats]]:
    """`expected(family, quant)`: the CPU plan's logits of two prompts."""
    known: dict[tuple[str, str], list[Floats]] = {}

    def get(family: str, quant: str) -> list[Floats]:
        if (family, quant) not in known:
            directory = checkpoint(family, quant)
            plan = compile_plan(directory, max_context=256, max_chunk=64, threads=2)
            with executor(plan, directory) as cpu:
                known[family, quant] = [
                    last_rows(cpu, ids_of(TOKENS, seed), PREFILL) for seed in (1, 2)
                ]
        return known[family, quant]

    return get


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("family", "quant", "ring", "gpus"),
    dealt([(family, "fp8") for family in FAMILIES], [(2, 1), (3, 1), (0, 1)])
    + [(family, "fp8", 2, 2) for family in FAMILIES]
    + [
        pytest.param(family, "bf16", ring, 1, marks=pytest.mark.slow)
        for family in FAMILIES
        for ring in (2, 3, 0)
    ],
)
def test_streamed_logits_are_the_cpu_plans_whatever_the_timing(
    family: str,
    quant: str,
    ring: int,
    gpus: int,
    checkpoint: Checkpoint,
    expected: Callable[[str, str], list[Floats]],
) -> None:
    directory = checkpoint(family, quant)
    plan = split_plan(directory, gpus=gpus, held=0.25, ring=ring)
    phase = plan.phase(STREAM)
    assert phase.ranks == gpus
    assert phase.ring == ring or ring == 0
    prompts = [ids_of(TOKENS, seed) for seed in (1, 2)]
    with executor(plan, directory, threads=1) as found:
        first = [last_rows(found, ids, STREAM) for ids in prompts]
        difference = np.concatenate(first) - np.concatenate(expected(family, quant))
        scale = np.linalg.norm(np.concatenate(expected(family, quant)), axis=1)
        off = np.linalg.norm(difference, axis=1) / scale
        # rounding; a row may be further away where it tips the choice of an expert
        assert np.median(off) < 0.01, off
        assert np.mean(off > 0.03) <= 0.25, off
        same_under_delays(found, range(SEEDS), prompts, first)


@pytest.mark.few(1)
@pytest.mark.parametrize("ring", [2, 3])
def test_streamed_logits_do_not_depend_on_timing(ring: int, checkpoint: Checkpoint) -> None:
    directory = checkpoint("mixtral", "bf16", layers=2)
    prompts = [ids_of(12, seed) for seed in (1, 2)]
    plan = split_plan(directory, held=0.25, ring=ring)
    with executor(plan, directory, threads=1) as found:
        first = [last_rows(found, ids, STREAM) for ids in prompts]
        seeds = range(1000 * ring, 1000 * ring + MORE_SEEDS)
        same_under_delays(found, seeds, prompts, first)


def same_under_delays(
    found: Executor,
    seeds: Iterable[int],
    prompts: list[npt.NDArray[np.int32]],
    expected: list[Floats],
) -> None:
    """Stream the prompts in turn, so that what another one left behind must not be read."""
    bound = device_phase(found, STREAM).bound
    sequence, positions = found.open(), np.arange(len(prompts[0]), dtype=np.int32)
    found.kv.reserve(sequence, len(positions))
    for seed in seeds:
        backend = HostBackend(bound.phase.ranks, 1 << 30, delays=seed)
        runner = ScheduleRunner(bound.phase, backend, bound.works)
        turn = seed % len(prompts)
        call = bound.call(
            prompts[turn], positions, positions * 0 + sequence.row, positions[-ROWS:].copy()
        )
        runner.run_untimed(call)
        backend.close()
        assert np.array_equal(bound.logits(call), expected[turn]), f"seed {seed}"


@pytest.mark.slow
def test_a_long_prompt_takes_several_calls(
    checkpoint: Checkpoint, expected: Callable[[str, str], list[Floats]]
) -> None:
    directory = checkpoint("qwen3_moe", "bf16")
    plan = split_plan(directory, switches=True)
    shorter = with_phase(plan, STREAM, lambda each: each.model_copy(update={"max_tokens": 12}))
    with executor(shorter, directory) as found:
        sequence = found.open()
        *_, logits = found.prefill(sequence, ids_of(TOKENS))
        assert found.calls == {STREAM: 3}
        wanted = expected("qwen3_moe", "bf16")[0][-1]
        assert np.linalg.norm(logits[0] - wanted) < 0.03 * np.linalg.norm(wanted)


@pytest.mark.slow
def test_one_lane_two_lanes_and_the_cpu_give_the_same_text() -> None:
    directory = Path(__file__).parents[2] / "examples" / "tiny-kjv"
    ids = [0, 5, 17, 300, 22]
    plan = split_plan(directory, switches=True)
    with executor(compile_plan(directory, max_context=256, threads=2), directory) as cpu:
        wanted = answer(cpu, ids, LENGTH)
    with executor(plan, directory) as found:
        for first in (PREFILL, STREAM):
            for later in ("decode", DUAL):
                assert answer(found, ids, LENGTH, prefill=first, decode=later) == wanted
        # a batch of three, by the phase of the plan's choice
        found.calls.clear()
        sequences = [found.open() for _ in range(3)]
        for sequence in sequences:
            *_, logits = found.prefill(sequence, np.array(ids, np.int32))
        token = int(logits[-1].argmax())
        for number in range(1, LENGTH):
            logits = found.decode(sequences, np.full(3, token, np.int32))
            token = int(logits[0].argmax())
            assert logits.argmax(1).tolist() == [wanted[number]] * 3
        assert found.calls == {PREFILL: 3, DUAL: LENGTH - 1}


# -- which phase -----------------------------------------------------------------------------------


def test_the_phase_is_chosen_by_length_batch_and_company(checkpoint: Checkpoint) -> None:
    plan = split_plan(checkpoint("qwen3_moe", "bf16"), switches=True)
    assert [prefill_phase(plan, tokens) for tokens in (1, 15, 16)] == [PREFILL, PREFILL, STREAM]
    assert prefill_phase(plan, 100, every=True) == PREFILL
    assert prefill_phase(plan, 100, decoding=2) == STREAM  # one GPU: nothing to stream beside
    assert [decode_phase(plan, batch) for batch in (1, 2)] == ["decode", DUAL]
    two = split_plan(checkpoint("qwen3_moe", "bf16"), gpus=2, switches=True)
    assert prefill_phase(two, 100) == STREAM
    assert prefill_phase(two, 100, decoding=1) == STREAM  # decode would wait for either
    assert prefill_phase(two, 100, decoding=1, beside=True) == BESIDE
    assert prefill_phase(two, 100, beside=True) == STREAM
    few = two.model_copy(
        update={"switches": tuple(s.model_copy(update={"tokens": 1}) for s in two.switches)}
    )
    assert [prefill_phase(few, tokens) for tokens in (3, 4)] == [PREFILL, STREAM]


def test_all_logits_of_a_prompt_come_from_the_phase_that_has_them(checkpoint: Checkpoint) -> None:
    directory = checkpoint("mixtral", "bf16")
    with executor(split_plan(directory, switches=True), directory) as found:
        sequence = found.open()
        parts = [part.copy() for part in found.prefill(sequence, ids_of(80), every=True)]
        assert sum(map(len, parts)) == 80
        assert found.calls == {PREFILL: 2}
        with pytest.raises(UsageError, match=r"no phase prefill\.other here: there are"):
            list(found.prefill(sequence, ids_of(3), phase="prefill.other"))


# -- what is seen ----------------------------------------------------------------------------------


def overlap(measured: Measured, phase: Any, one: str, other: str) -> float:
    """Seconds in which both resources are busy."""
    spans: dict[str, list[tuple[float, float]]] = {one: [], other: []}
    for step, start, stop in zip(phase.steps, measured.start, measured.finish, strict=True):
        if step.resource in spans:
            spans[step.resource].append((start, stop))
    return sum(
        max(0.0, min(a[1], b[1]) - max(a[0], b[0])) for a in spans[one] for b in spans[other]
    )


@pytest.mark.parametrize(
    ("name", "one", "other", "tokens", "least"),
    [(STREAM, "h2d0", "gpu0", 32, 20e-3), (DUAL, "cpu", "gpu0", 4, 8e-3)],
)
def test_both_resources_are_busy_at_once(
    name: str, one: str, other: str, tokens: int, least: float, checkpoint: Checkpoint
) -> None:
    directory = checkpoint("mixtral", "bf16")
    plan = split_plan(directory, held=0.25)

    def slowed(work: Callable[[Any], None], seconds: float, call: Any) -> None:
        time.sleep(seconds)
        work(call)

    with executor(plan, directory) as found:
        bound = device_phase(found, name).bound
        sequences = [found.open() for _ in range(tokens if name == DUAL else 1)]
        for sequence in sequences:
            found.kv.reserve(sequence, tokens)
        rows = np.array([sequence.row for sequence in sequences], np.int32)
        positions = np.arange(tokens, dtype=np.int32) * (len(sequences) == 1)
        call = bound.call(
            ids_of(tokens), positions, np.resize(rows, tokens), np.array([tokens - 1], np.int32)
        )
        backend = HostBackend(1, 1 << 30)
        works = [
            partial(slowed, work, 15e-3 if step.resource == "cpu" else 2e-3)
            for step, work in zip(bound.phase.steps, bound.works, strict=True)
        ]
        runner = ScheduleRunner(bound.phase, backend, works)
        runner.run(call)  # first calls map pages
        measured = runner.run(call)
        backend.close()
        assert overlap(measured, bound.phase, one, other) > least


def test_a_trace_has_a_row_for_every_stream(checkpoint: Checkpoint) -> None:
    directory = checkpoint("qwen3_moe", "bf16")
    plan = split_plan(directory, switches=True)
    with executor(plan, directory) as found:
        with found.recorded() as recorder:
            answer(found, prompt(20, 1), 3)
        trace = chrome_trace(plan, recorder)["traceEvents"]
        rows = {each["args"]["name"]: each["tid"] for each in trace if each["ph"] == "M"}
        assert {"stream cpu", "stream gpu0", "stream h2d0", "stream d2h0", "worker 0"} <= set(rows)
        ops = {each["name"] for each in trace if each["tid"] == rows["stream h2d0"]}
        assert "load" in ops
        assert any(each["tid"] == rows["worker 0"] and each["ph"] == "X" for each in trace)
        for name in (STREAM, "decode"):
            seconds = recorder.with_python(name)
            assert set(seconds) == {step.id for step in plan.phase(name).steps}
            assert all(value >= 0 for value in seconds.values())
            measured = device_phase(found, name).last
            assert measured is not None
            assert max(measured.finish) > 0
        used = found.kernels_used
        assert any(name.startswith("triton:experts-k") for name in used)
        assert any(name.startswith("embed_bf16") for name in used)


@pytest.mark.slow
def test_routing_is_counted_on_gpus_too(checkpoint: Checkpoint) -> None:
    directory = checkpoint("deepseek_v3", "bf16")
    texts = []
    for plan in (
        split_plan(directory, switches=True),
        compile_plan(directory, max_context=256, threads=2),
    ):
        recorder = RoutingRecorder()
        with executor(plan, directory, routing=recorder) as found:
            recorder.begin()
            answer(found, prompt(40, 1), 1)
        texts.append(recorder.as_json())
    for part in ("learn", "held_out"):
        mine, cpus = (text[part] for text in texts)
        assert mine["tokens"] == cpus["tokens"]
        for layer, counts in cpus["counts"].items():
            moved = np.abs(np.array(mine["counts"][layer]) - counts).sum()
            assert moved <= 0.1 * sum(counts)  # rounding tips few choices


# -- faults ----------------------------------------------------------------------------------------


def test_a_dropped_event_is_refused_when_a_plan_is_loaded(
    checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = split_plan(checkpoint("qwen3_moe", "bf16"))
    path = tmp_path / "plan.hmp"
    for name in (STREAM, DUAL):
        waits = waits_of(plan.phase(name))
        for at, event in (waits[0], waits[len(waits) // 2], waits[-1]):
            wrong = with_phase(plan, name, partial(without_wait, at=at, event=event))
            planfile.save(wrong, path)
            with pytest.raises(VerifyError, match=f"phase {name}, step"):
                load_plan(path)


def test_memory_of_a_gpu_is_enforced(checkpoint: Checkpoint) -> None:
    directory = checkpoint("qwen3_moe", "bf16")
    plan = split_plan(directory)
    with executor(plan, directory) as found:
        assert isinstance(found.phases[STREAM], DevicePhase)
    small = plan.model_copy(update={"machine": with_memory(plan.machine, 1 << 20)})
    before = threads()
    with pytest.raises(CapacityError, match=r"gpu0 cannot hold .*bytes asked, .* free"):
        Executor(small, directory, threads=2, devices="host")
    assert threads() == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("devices", ["auto", "cuda"])
def test_without_a_gpu_the_error_says_what_else_there_is(
    devices: Any, checkpoint: Checkpoint
) -> None:
    plan = split_plan(checkpoint("qwen3_moe", "bf16"))
    with pytest.raises(MachineError, match=r"needs 1 GPU.*--devices host") as caught:
        Executor(plan, checkpoint("qwen3_moe", "bf16"), threads=2, devices=devices)
    assert "\n" not in str(caught.value)


def test_a_plan_for_the_cpu_needs_no_devices(checkpoint: Checkpoint) -> None:
    directory = checkpoint("mixtral", "bf16")
    with executor(compile_plan(directory, threads=2), directory, devices="cuda") as found:
        assert not any(isinstance(each, DevicePhase) for each in found.phases.values())


def breaking(monkeypatch: pytest.MonkeyPatch, op: str, fault: Callable[[], None]) -> None:
    """Let every step of an op call `fault` first."""
    make = DEVICE_OPS[op]

    def made(bound: Any, step: Any) -> Callable[[Any], None]:
        work = make(bound, step)

        def broken(call: Any) -> None:
            fault()
            work(call)

        return broken

    monkeypatch.setitem(DEVICE_OPS, op, made)


def test_a_step_that_raises_ends_everything(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16")

    def fault() -> None:
        raise ValueError("a bad step")

    breaking(monkeypatch, "route", fault)
    before = threads()
    plan = split_plan(directory, switches=True)
    backend = open_devices(plan, plan.phases, "host")
    found = Executor(plan, directory, threads=2, devices=backend)
    assert backend.devices[0].used > 0
    sequence = found.open()
    with pytest.raises(ExecutionError, match=r"phase prefill\.stream, step .*ValueError: a bad"):
        list(found.prefill(sequence, ids_of(20)))
    with pytest.raises(HmcError):
        list(found.prefill(sequence, ids_of(20)))
    found.close()
    found.close()
    assert backend.devices[0].used == 0
    gc.collect()
    assert threads() == before


@pytest.mark.slow
def test_a_step_that_hangs_is_reported(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16")
    hold = threading.Event()
    breaking(monkeypatch, "route", lambda: hold.wait(30) and None)
    plan = split_plan(directory, switches=True)
    backend = HostBackend(1, 1 << 30, timeout=0.5)
    with executor(plan, directory, devices=backend) as found:
        start = time.monotonic()
        with pytest.raises(WorkerError, match=r"gpu0 is at phase prefill\.stream, step"):
            list(found.prefill(found.open(), ids_of(20)))
    assert time.monotonic() - start < 10
    assert backend.devices[0].used == 0
    hold.set()


def test_ctrl_c_waits_for_the_end_of_a_call(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = checkpoint("mixtral", "bf16")
    strikes = [True]

    def strike() -> None:
        if strikes:
            strikes.pop()
            os.kill(os.getpid(), signal.SIGINT)

    breaking(monkeypatch, "route", strike)
    with executor(split_plan(directory, switches=True), directory) as found:
        with pytest.raises(KeyboardInterrupt):
            answer(found, prompt(20, 1), 1)
        assert not strikes
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert len(answer(found, prompt(20, 1), 3)) == 3
