"""Sections of the GPU check: prompts through streamed weights, and the length of the ring.

Times by stream come from one recorded call more, after those that are timed as a whole. Overlap
efficiency is max(transfer, compute) / the call, where transfer and compute are the busy times of
the streams h2d0 and gpu0 in that very call. The plain copy beside it is timed before and after.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import median

import torch

from gpu.plans import only, resident
from gpu.rows import Clock, Row, Verdict
from gpu.sizes import Bench, token_ids
from hmc.errors import ExecutionError
from hmc.plan import Plan
from hmc.plan.phases import STREAM
from hmc.predict.cost import CostModel
from hmc.predict.run import run_prefill
from hmc.runtime.devices.pinned import pinned
from hmc.runtime.executor import Executor
from hmc.runtime.phases.phase import DevicePhase
from hmc.runtime.schedule.runner import Measured

_PASSES = 3
_COPY_GOAL, _OVERLAP_GOAL, _ERROR_GOAL = 0.95, 0.95, 0.10


class PlainCopy:
    """One copy of pinned memory to the device; `rate` times it."""

    def __init__(self, device: torch.device, nbytes: int) -> None:
        self._cuda = device.type == "cuda"
        self._host = (
            pinned(nbytes, "the plain copy")
            if self._cuda
            else torch.empty(nbytes, dtype=torch.uint8)
        )
        self._host.fill_(1)
        self._there = torch.empty(nbytes, dtype=torch.uint8, device=device)
        self._once()

    def rate(self) -> float:
        """Bytes/s, median of some copies."""
        return len(self._host) / median(self._once() for _ in range(_PASSES))

    def _once(self) -> float:
        start = time.perf_counter()
        self._there.copy_(self._host, non_blocking=True)
        if self._cuda:
            torch.cuda.synchronize(self._there.device)
        return time.perf_counter() - start


@dataclass(frozen=True)
class Streamed:
    """One prompt: seconds of each repetition; of the recorded one, calls, seconds, busy seconds of
    copies and of computing, and bytes and seconds of the loads."""

    seconds: tuple[float, ...]
    calls: int
    recorded: float
    transfer: float
    compute: float
    loaded: int
    loading: float


def measure_prompt(executor: Executor, tokens: int, repetitions: int) -> Streamed:
    """A prompt of random tokens through `prefill.stream`, after one to warm up."""
    phase = executor.phases[STREAM]
    if not isinstance(phase, DevicePhase):
        raise ExecutionError(f"{STREAM} does not run on devices here")
    seconds = [_prompt(executor, tokens, seed)[0] for seed in range(repetitions + 1)]
    with executor.recorded():
        _, calls = _prompt(executor, tokens, repetitions + 1)
    steps = phase.bound.phase.steps
    transfer = compute = loading = 0.0
    loaded = 0
    for call in calls:
        for step, start, finish in zip(steps, call.start, call.finish, strict=True):
            took = finish - start
            if step.resource == "gpu0":
                compute += took
            elif step.resource == "h2d0":
                transfer += took
                if step.op == "load":
                    loaded += step.weight_bytes
                    loading += took
    whole = sum(max(call.finish) for call in calls)
    return Streamed(tuple(seconds[1:]), len(calls), whole, transfer, compute, loaded, loading)


def stream(bench: Bench, name: str, clock: Clock) -> Iterator[Row]:
    """Prompts of every length: tokens a second beside the prediction, loads beside a plain copy,
    overlap."""
    section = f"stream {name}"
    copy = PlainCopy(bench.device, bench.sizes.copy)
    longest = max(bench.sizes.prompts)
    clock.check("compiling")
    plan = bench.model(name, longest).streamed(longest)[0]
    with bench.running(name, only(plan, STREAM)) as executor:
        for tokens in bench.sizes.prompts:
            clock.check(f"{tokens} tokens")
            before = copy.rate()
            found = measure_prompt(executor, tokens, bench.sizes.repetitions)
            plain = (before + copy.rate()) / 2
            yield from _rows(bench, section, plan, tokens, found, plain)


def _rows(
    bench: Bench, section: str, plan: Plan, tokens: int, found: Streamed, plain: float
) -> Iterator[Row]:
    case = f"{tokens} tokens"
    seconds = median(found.seconds)
    predicted = run_prefill(plan, CostModel(plan, bench.machine), tokens, STREAM).seconds
    ring = plan.phase(STREAM).ring
    yield Row(
        section,
        case,
        "time to the first token",
        seconds,
        "s",
        "predicted",
        predicted,
        _goal(bench, abs(predicted / seconds - 1) <= _ERROR_GOAL),
        f"{found.calls} call(s), {plan.model.layers} layers, ring of {ring},"
        f" {resident(plan):.0%} of the experts resident",
    )
    yield Row(section, case, "prompt", tokens / seconds, "tok/s", "predicted", tokens / predicted)
    rate = found.loaded / found.loading if found.loading else 0.0
    yield Row(
        section,
        case,
        "loads to the GPU",
        rate,
        "B/s",
        "plain pinned copy" if bench.devices == "cuda" else "plain copy",
        plain,
        _goal(bench, rate >= _COPY_GOAL * plain),
        f"{found.loaded / 1e9:.3g} GB in {found.loading:.3g} s",
    )
    most = max(found.transfer, found.compute)
    yield Row(
        section,
        case,
        "longer of transfer and compute",
        most,
        "s",
        "the recorded call",
        found.recorded,
        _goal(bench, most >= _OVERLAP_GOAL * found.recorded),
        f"transfer {found.transfer:.3g} s, compute {found.compute:.3g} s",
    )


def rings(bench: Bench, name: str, clock: Clock) -> Iterator[Row]:
    """One prompt through rings of 2, 4, 8, ... experts and of a whole layer's, in the memory that
    the longest prompt has; each beside the prediction."""
    clock.check("compiling")
    longest = max(bench.sizes.prompts)
    model = bench.model(name, longest)
    experts = model.host().model.experts
    lengths = [2**power for power in range(1, experts.bit_length()) if 2**power < experts]
    for plan in model.streamed(longest, [*lengths, experts]):
        clock.check(f"a ring of {plan.phase(STREAM).ring}")
        yield _ring(bench, name, plan)


def _ring(bench: Bench, name: str, plan: Plan) -> Row:
    tokens = bench.sizes.ring_prompt
    with bench.running(name, only(plan, STREAM)) as executor:
        found = measure_prompt(executor, tokens, bench.sizes.repetitions)
    seconds = median(found.seconds)
    predicted = run_prefill(plan, CostModel(plan, bench.machine), tokens, STREAM).seconds
    most = max(found.transfer, found.compute)
    return Row(
        f"ring {name}",
        f"ring of {plan.phase(STREAM).ring}",
        f"prompt of {tokens}",
        tokens / seconds,
        "tok/s",
        "predicted",
        tokens / predicted,
        note=f"overlap {most / found.recorded:.3f}, {found.calls} call(s)",
    )


def _goal(bench: Bench, reached: bool) -> Verdict:
    """Goals are those of GPUs."""
    if bench.devices != "cuda":
        return ""
    return "ok" if reached else "missed"


def _prompt(executor: Executor, tokens: int, seed: int) -> tuple[float, list[Measured]]:
    """Seconds until the logits are there, and where calls are recorded, when their steps ran."""
    phase = executor.phases[STREAM]
    assert isinstance(phase, DevicePhase)
    ids = token_ids(tokens, executor.plan.model.vocab, seed)
    calls: list[Measured] = []
    sequence = executor.open()
    try:
        start = time.perf_counter()
        for _ in executor.prefill(sequence, ids, phase=STREAM):
            if phase.recorder is not None and phase.last is not None:
                calls.append(phase.last)
        return time.perf_counter() - start, calls
    finally:
        executor.release(sequence)
