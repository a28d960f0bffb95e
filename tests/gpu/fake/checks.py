"""The statements about the CUDA path, and how each is found out on played GPUs.

A check yields statements; what goes wrong in between is the child's to tell (child.py).
"""

from __future__ import annotations

import importlib
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from types import SimpleNamespace
from typing import Any
from unittest import mock
from unittest.mock import Mock

import numpy as np
import torch
from device_ops_fake import Buffers, step_of, stored

from gpu import check as gpu_check
from gpu import parity
from gpu import sizes as gpu_sizes
from gpu.fake import launches, log
from gpu.fake.machine import here
from gpu.fake.opened import ids, prompt, shaped, tiny, without_cpu
from gpu.models import DEEPSEEK
from gpu.rows import Clock, Row
from hmc.plan import Phase, Step
from hmc.plan.phases import BESIDE, DECODE, DUAL, PREFILL, STREAM
from hmc.runtime.device_ops.gpu.table import TRITON_OPS
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.devices.cuda import CudaStream
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.phases.phase import DevicePhase
from hmc.runtime.schedule.runner import ScheduleRunner

RATES = "epyc9355-rtx5090"
"""Of the CPU in gpu-check, which would only spend time on measuring them."""


@dataclass(frozen=True)
class Statement:
    """What is said, whether it holds, what was called meanwhile (`log.Counts` in words), and why it
    does not hold, each place once."""

    text: str
    holds: bool
    counts: str = ""
    why: tuple[str, ...] = ()


Check = Callable[[], Iterator[Statement]]


def _allowed(text: str) -> Statement:
    """That no call since `reset` was one that a GPU refuses."""
    found = log.illegal()
    return Statement(text, not found, str(log.counts()), tuple(found))


def _unstopped(text: str) -> Statement:
    """That no step since `reset` stopped the thread that hands over, this one."""
    mine = [s for s in log.stops if s.thread == threading.get_native_id() and s.step]
    why = Counter(f"{stop.what} at {stop.where} ({_op(stop.step)})" for stop in mine)
    told = tuple(f"{n} x {what}" for what, n in why.most_common())
    return Statement(text, not mine, str(log.counts()), told)


def _op(label: str) -> str:
    found = re.search(r"\((\w+), layer", label)
    return found[1] if found else label


def gpu_check_ends() -> Iterator[Statement]:
    """`make gpu-check` to its end, however long that takes without a GPU. Its numbers are none, so
    logits are not compared."""

    def uncompared(case: str, phase: str, found: object, expected: object) -> Row:
        return Row("parity", case, f"{phase}, not compared")

    with (
        mock.patch.object(parity, "_compared", uncompared),
        mock.patch.object(Clock, "check", Mock()),
    ):
        rows = gpu_check.check(gpu_sizes.SMALL, "cuda", rates=RATES, seconds=3600.0)
    sections: dict[str, str] = {}
    for row in rows:
        wrong = row.verdict in ("FAILED", "left out") and not row.what
        sections[row.section] = sections.get(row.section, "") or row.note * wrong
    ended = [f"{name}: {note}" for name, note in sections.items() if note]
    text = f"gpu-check: all {len(sections)} sections end without an exception"
    yield Statement(text, not ended, str(log.counts()), tuple(ended))
    yield _allowed("gpu-check: no call is refused")


_SIZES = (
    (1, 2048, 7168), (2, 2048, 7168), (3, 2048, 7168), (6, 768, 2048), (8, 2048, 768),
    (40, 256, 256), (512, 2048, 7168), (1, 128, 128), (5, 200, 192),
)  # fmt: skip
"""Tokens, rows and columns of products with fp8 weights."""
_FORMATS = ("bf16", "fp16", "f32", "int4")


def products() -> Iterator[Statement]:
    """Products of all formats that devices have, as steps do them."""
    cases = [("fp8", *size) for size in _SIZES]
    cases += [(form, tokens, 256, 320) for form in _FORMATS for tokens in (1, 3, 64)]
    wrong: dict[str, list[str]] = {}
    for form, tokens, rows, columns in cases:
        before, why = len(log.lines()), ""
        try:
            _product(form, tokens, rows, columns)
        except Exception as error:  # each product has a try of its own
            why = told(error)
        why = next(iter(log.illegal(before)), why)
        if why:
            wrong.setdefault(why, []).append(f"{form} {tokens} x {rows} x {columns}")
    number = sum(map(len, wrong.values()))
    text = f"products: none of {len(cases)} in 5 formats is refused ({number} are)"
    told_all = tuple(f"{why} [{', '.join(of)}]" for why, of in wrong.items())
    yield Statement(text, not wrong, str(log.counts()), told_all)


def _product(form: str, tokens: int, rows: int, columns: int) -> None:
    """What a step "linear" does on a GPU."""
    w = _weight(form, rows, columns)
    x = torch.zeros(tokens, columns, dtype=torch.bfloat16, device="cuda")
    y = x.new_zeros(tokens, rows, dtype=torch.float32)
    bound: Any = Buffers({"x": x, "y": y}, {"weight": w})
    bound.workspace = lambda step: _workspace()
    call: Any = SimpleNamespace(tokens=tokens, count=lambda share: tokens)
    TRITON_OPS["linear"](bound, step_of("linear", bound, "y", n=rows, k=columns))(call)


@cache
def _workspace() -> Workspace:
    return Workspace(torch.device("cuda"))


@cache
def _weight(form: str, rows: int, columns: int) -> Matrix:
    w = stored(form, rows, columns)
    return replace(w, planes=tuple(plane.cuda() for plane in w.planes))


_PROMPT, _SHORT, _STEPS = 40, 12, 6


def small_model() -> Iterator[Statement]:
    """The bundled model: a streamed prompt, prompts on the host, decode of one and of four
    sequences, two lanes; and what becomes of captures."""
    with tiny("shared") as executor:
        compiled = _compiled_from_here()
        first, others = executor.open(), [executor.open() for _ in range(3)]
        every = [first, *others]
        work: tuple[tuple[str, Callable[[], object]], ...] = (
            ("a streamed prompt", partial(_append, executor, [first], _PROMPT, STREAM)),
            ("prompts on the host", partial(_append, executor, others, _SHORT, PREFILL)),
            ("decode of 1", partial(_decode, executor, [first], DECODE)),
            ("decode of 4", partial(_decode, executor, every, DECODE)),
            ("two lanes of 2", partial(_decode, executor, every, DUAL)),
        )
        for name, do in work:
            log.reset()
            do()
            race = " and no race is seen" if here().sanitized else ""
            yield _allowed(f"tiny-kjv, {name}: no call is refused{race}")
        if not here().sanitized:
            yield from _captures(executor)
        text = f"tiny-kjv: calls find all kernels compiled ({len(compiled)} are not)"
        yield Statement(text, not compiled, str(log.counts()), tuple(compiled))


def _compiled_from_here() -> list[str]:
    """The kernels that Triton compiles from now on, in the making."""
    names: list[str] = []

    def note(*, fn: Any, **_: object) -> None:
        names.append(fn.name)

    importlib.import_module("triton").knobs.runtime.jit_post_compile_hook = note
    return names


def _append(executor: Executor, sequences: list[Sequence], tokens: int, phase: str) -> None:
    for sequence in sequences:
        for _ in executor.prefill(sequence, ids(tokens), phase=phase):
            pass


def _decode(executor: Executor, sequences: list[Sequence], phase: str) -> None:
    for _ in range(_STEPS):
        executor.decode(sequences, ids(len(sequences)), phase)


def _captures(executor: Executor) -> Iterator[Statement]:
    """Once more with everything captured: a segment is one replay, and nothing is captured anew."""
    for name in (DECODE, DUAL):
        phase = executor.phases[name]
        assert isinstance(phase, DevicePhase) and isinstance(phase.runner, ScheduleRunner)
        sequences = [executor.open() for _ in range(2)]
        _append(executor, sequences, _SHORT, PREFILL)
        _decode(executor, sequences, name)
        log.reset()
        executor.decode(sequences, ids(len(sequences)), name)
        segments, counts = len(phase.runner.segments), log.counts()
        captured = sum("capture begins" in line for line in log.lines())
        why = [phase.graphs.refused if phase.graphs else "there are none"]
        if counts.graphs != segments or captured:
            why.append(f"{counts.graphs} of {segments} replayed, {captured} captured anew")
        why = list(filter(None, why))
        text = f"tiny-kjv, {name}: captures are replayed, {segments} a call"
        yield Statement(text, not why, str(counts), tuple(why))
        yield _unstopped(f"tiny-kjv, {name}: nothing stops the thread in a call")
        for sequence in sequences:
            executor.release(sequence)


def sanitizer() -> Iterator[Statement]:
    """What the other statements about races are worth: streams that wait for nothing."""
    with tiny("shared") as executor:
        sequence, why = executor.open(), "nothing is seen"
        with mock.patch.object(CudaStream, "wait", Mock()):
            try:
                _append(executor, [sequence], _PROMPT, STREAM)
            except Exception as error:  # the sanitizer's
                why = told(error)
        text = "tiny-kjv, without waits: a race is seen at a launch of Triton's"
        yield Statement(text, bool(launches.races), str(log.counts()), (why,))


def default_streams() -> Iterator[Statement]:
    """Several GPUs that one process drives: work on a default stream waits for no event of the
    schedule, and nothing waits for it."""
    with tiny("mapped") as executor:
        sequences = [executor.open() for _ in range(2)]
        for phase, do in (
            (STREAM, partial(_append, executor, sequences[:1], _PROMPT, STREAM)),
            (PREFILL, partial(_append, executor, sequences[1:], _SHORT, PREFILL)),
            (DECODE, partial(_decode, executor, sequences, DECODE)),
            (DUAL, partial(_decode, executor, sequences, DUAL)),
        ):
            log.reset()
            do()
            yield _off_the_default(phase)
            yield _allowed(f"tiny-kjv, {phase}: no call is refused")


_BESIDE, _PATIENCE_SECONDS = 200, 120.0


def beside() -> Iterator[Statement]:
    """A prompt on the last GPU while the first decodes, each handed over by a thread of its own."""
    with tiny("shared") as executor:
        long, short = executor.open(), executor.open()
        assert executor.beside is not None
        _append(executor, [short], _SHORT, PREFILL)
        executor.kv.reserve(long, _BESIDE)
        log.reset()
        job, steps = executor.beside.start(long, ids(_BESIDE)), 0
        until = time.monotonic() + _PATIENCE_SECONDS
        while not job.over and time.monotonic() < until:
            executor.decode([short], ids(1), DECODE)
            steps += 1
        text = f"tiny-kjv, {BESIDE} and {steps} steps of {DECODE}: both end"
        why = "it takes too long" if job.error is None else told(job.error)
        ended = job.logits is not None
        yield Statement(text, ended, str(log.counts()), () if ended else (why,))
        yield _off_the_default(BESIDE)
        yield _allowed(f"tiny-kjv, {BESIDE}: no call is refused")


def _off_the_default(phase: str) -> Statement:
    """That no step of any thread since `reset` launched anything on a default stream."""
    steps: dict[str, str] = {}
    astray, every = Counter[str](), 0
    for whole in log.lines():
        thread, _, line = whole.partition(" ")
        if line.startswith("step"):
            steps[thread] = line.removeprefix("step").strip()
            continue
        found = re.match(r"(launch|copy|fill|graph)\b.* gpu(\d+) stream (\d+)\b", line)
        if found and steps.get(thread):
            every += 1
            if found[3] == "0":
                astray[f"{found[1]} on gpu{found[2]} in {_op(steps[thread])}"] += 1
    why = tuple(f"{n} x {what}" for what, n in astray.most_common())
    text = f"tiny-kjv, {phase}: nothing on a default stream ({sum(astray.values())} of {every})"
    return Statement(text, not astray, str(log.counts()), why)


_LAYERS, _TOKENS = 6, 4000


def order() -> Iterator[Statement]:
    """A streamed prompt in true shapes, the second of two: what the thread that hands over does
    between its first step and its last."""
    with shaped(DEEPSEEK, _LAYERS) as executor:
        phase = executor.plan.phase(STREAM)
        prompt(executor, _TOKENS, STREAM)
        log.reset()
        prompt(executor, _TOKENS, STREAM)
        early, late = _ahead(phase, _handed_over(phase))
        text = f"{DEEPSEEK}, {STREAM}: loads with free slots precede the sort ({early} do)"
        yield Statement(text, not late, str(log.counts()), tuple(late))
        yield _unstopped(f"{DEEPSEEK}, {STREAM}: nothing stops the thread in {_LAYERS} layers")
        yield _allowed(f"{DEEPSEEK}, {STREAM}: no call is refused")


def _handed_over(phase: Phase) -> list[Step]:
    """The steps in the order of the log."""
    known = {step.id: step for step in phase.steps}
    lines = log.lines(threading.get_native_id())
    found = (re.match(r"step phase \S+, step (\d+) ", line) for line in lines)
    return [known[int(each[1])] for each in found if each]


def _ahead(phase: Phase, handed: list[Step]) -> tuple[int, list[str]]:
    """How many loads of experts precede their layer's sort, and those that could and do not: what
    they wait for was handed over before, and so were the loads before them on their way."""
    sorts = {step.layer: at for at, step in enumerate(handed) if step.op == "sort"}
    places = {step.id: at for at, step in enumerate(handed)}
    signals = {step.signal: step.id for step in phase.steps if step.signal >= 0}
    early, late, blocked = 0, [], set[tuple[str, int]]()
    for step in handed:
        if step.op != "load" or step.layer not in sorts:
            continue
        sort, way = sorts[step.layer], (step.resource, step.layer)
        waits = [places[signals[event]] for event in step.waits]
        if any(at > sort for at in waits):
            blocked.add(way)
        if places[step.id] < sort:
            early += 1
        elif way not in blocked:
            late.append(f"load {step.id} of layer {step.layer} comes after the sort")
    return early, late


_CONTEXT_BYTES = 0.5e9
"""A driver's context with the libraries' own memory, as told of such cards; not measured."""
_LONG = (4000, 20000)


def memory() -> Iterator[Statement]:
    """What PyTorch takes of a GPU at most in true shapes, beside the plan's ledger."""
    with shaped(DEEPSEEK, 4) as executor:
        plan = executor.plan
        ledger = sum(item.bytes for item in plan.ledger if item.device == "gpu0")
        for tokens in _LONG:
            prompt(executor, tokens, STREAM)
        without_cpu()
        sequences = []
        for length in (_LONG[-1], 100, 100, 100):
            sequences.append(executor.open())
            executor.kv.reserve(sequences[-1], length)
            sequences[-1].length = length
        for count in (1, 4):
            for _ in range(5):
                executor.decode(sequences[:count], np.full(count, 5, np.int32), DECODE)
        taken = torch.cuda.max_memory_reserved() + _CONTEXT_BYTES
        whole = plan.machine.gpus[0].memory_bytes
        text = (
            f"{DEEPSEEK}: PyTorch takes {(taken - ledger) / 1e9:+.2f} GB beside the ledger's"
            f" {ledger / 1e9:.1f}, of {(whole - ledger) / 1e9:.2f}"
        )
        yield Statement(text, taken <= whole, str(log.counts()))


def told(error: BaseException) -> str:
    """An error in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


CHECKS: dict[str, Check] = {
    "gpu-check": gpu_check_ends,
    "products": products,
    "small model": small_model,
    "sanitizer": sanitizer,
    "default streams": default_streams,
    "beside": beside,
    "order": order,
    "memory": memory,
}
