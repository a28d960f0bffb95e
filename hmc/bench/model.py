"""Prefill and decode of a plan: tokens a second, and how near they come to what memory and
arithmetic give.

Decode: MBU = bytes of weights one token reads / time of the step / streaming read, where the time
is all of it: native program, sampling (greedy) and Python. `outside_kernels` is the share of that
time in which a worker is in no kernel: waiting for others at a barrier, or for Python. Prefill: the
share of the multiply-add peak that the matmuls' FLOPs make (attention's own products come on top,
and are not counted).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from operator import add
from statistics import median
from types import MappingProxyType
from typing import Any

import numpy as np
import numpy.typing as npt

from hmc.bench.bandwidth import MemoryReference, dot_peak
from hmc.bench.compare import Compared, Report, in_turn, silent
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS
from hmc.errors import ContextLengthError, ExecutionError, UsageError
from hmc.ops import OPS
from hmc.ops.matmul import distinct_experts
from hmc.plan import Phase, Plan
from hmc.plan.phases import DECODE, PREFILL, decode_phase, prefill_phase
from hmc.predict.loads import Load
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence as CacheSequence
from hmc.runtime.tokens.sampler import Sampler, SamplingParams

_WARM_STEPS = 4

Ids = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Row:
    """One test: a prefill (pp512), or decoding (tg64, tg64@4096 behind 4096 tokens of context,
    tg64x4 of four sequences at once), which is a measurement of `load` in `phase`.

    `rates` are tokens/s of each repetition, of all sequences together; `compared` is FLOP/s against
    the peak (prefill) or bytes/s of weights against the streaming read. `by_step` are the seconds
    of each step of one more, recorded prefill, or of a token, medians over the repetitions.
    `figures` are what stands beside them as JSON has it.
    """

    test: str
    load: Load
    rates: tuple[float, ...]
    compared: Compared
    by_step: Mapping[int, float]
    phase: str
    figures: Mapping[str, Any]

    def record(self) -> dict[str, Any]:
        """As JSON has it."""
        return {
            "test": self.test,
            "tokens_per_second": round(median(self.rates), 3),
            "min": round(min(self.rates), 3),
            "max": round(max(self.rates), 3),
            "repetitions": len(self.rates),
            **self.figures,
        }


class ModelBench:
    """An executor and the references of its own pool. Token ids are random (seeded), so every step
    routes anew."""

    def __init__(
        self,
        executor: Executor,
        *,
        repetitions: int = 5,
        megabytes: int = 0,
        phases: Mapping[str, str] = MappingProxyType({}),
        report: Report = silent,
    ) -> None:
        """Runs the sweep for the streaming read (`megabytes` a pass, 0: as MemoryReference).
        `phases` names the phase of every "prefill" or "decode"; else the plan's switches do.
        """
        self.plan, self._executor, self._repetitions = executor.plan, executor, repetitions
        self._report, self._phases = report, phases
        jit, isa = Jit(EMITTERS), TIERS[self.plan.isa]
        self.memory = MemoryReference(executor.pool, jit, isa, megabytes=megabytes, report=report)
        self._peak = partial(dot_peak, executor.pool, jit, isa, repetitions=3)
        self._random = np.random.default_rng(0)
        self._warm()

    def prompt(self, tokens: int) -> Row:
        """Prefill of a fresh sequence, up to the logits of its last token."""
        flops = prefill_flops(self.plan, tokens)
        seconds: list[float] = []

        def rate() -> float:
            seconds.append(self._prefill(tokens))
            return flops / seconds[-1]

        test = f"pp{tokens}"
        (compared,) = in_turn([rate], self._peak, self._repetitions, test, self._report)
        with self._executor.recorded() as recorder:
            self._prefill(tokens)
        name = self._phases.get("prefill") or prefill_phase(self.plan, tokens)
        steps = recorder.with_python(name)
        figures = {
            "gflops": round(compared.value / 1e9, 2),
            "reference_gflops": round(compared.reference / 1e9, 2),
            "peak_share": round(compared.ratio, 4),
        }
        rates = tuple(tokens / each for each in seconds)
        return Row(test, Load("prefill", tokens), rates, compared, steps, name, figures)

    def decodes(self, tokens: int, context: int, batches: Sequence[int] = (1,)) -> list[Row]:
        """`tokens` steps of so many sequences at once, each behind `context` tokens, for each of
        `batches`, which take turns; repetitions start at the same place."""
        steps: list[list[_Steps]] = [[] for _ in batches]
        with self._sequences(context, max(batches)) as sequences:

            def turn(index: int, size: int) -> Callable[[], float]:
                def rate() -> float:
                    mine = sequences[: batches[index]]
                    for sequence in mine:
                        sequence.length = context
                    steps[index].append(self._steps(mine, tokens))
                    return size * tokens / steps[index][-1].seconds

                return rate

            turns = [turn(i, active_bytes(self.plan, batch)) for i, batch in enumerate(batches)]
            name = f"tg{tokens}"
            compared = in_turn(turns, self.memory.rate, self._repetitions, name, self._report)
        return [
            self._row(tokens, context, *each) for each in zip(batches, compared, steps, strict=True)
        ]

    def _row(
        self, tokens: int, context: int, batch: int, compared: Compared, steps: Sequence[_Steps]
    ) -> Row:
        phase = self.plan.phase(self._decode_phase(batch))
        # shares of a repetition: workers between kernels while the native program runs, and
        # everything but native programs
        waiting = [(each.native - each.kernels) / each.seconds for each in steps]
        python = [1 - each.native / each.seconds for each in steps]
        several, behind = f"x{batch}" * (batch > 1), f"@{context}" * bool(context)
        by_step = {
            step.id: median(each.by_step.get(step.id, 0.0) for each in steps) / tokens
            for step in phase.steps
        }
        return Row(
            f"tg{tokens}{several}{behind}",
            Load("decode", context + tokens // 2, batch),  # the context in the middle
            tuple(batch * tokens / each.seconds for each in steps),
            compared,
            by_step,
            phase.name,
            {
                "mbu": round(compared.ratio, 4),
                "outside_kernels": round(median(map(add, waiting, python)), 4),
                "waiting": round(median(waiting), 4),
                "python": round(median(python), 4),
                "batch": batch,
                "gbps": round(compared.value / 1e9, 3),
                "reference_gbps": round(compared.reference / 1e9, 3),
                "ops": _op_shares(phase, steps, tokens),
            },
        )

    def _decode_phase(self, batch: int) -> str:
        return self._phases.get("decode") or decode_phase(self.plan, batch)

    def _prefill(self, tokens: int) -> float:
        phase = self._phases.get("prefill", "")
        return prefill_seconds(self._executor, self._ids(tokens), phase)

    def _steps(self, sequences: Sequence[CacheSequence], tokens: int) -> _Steps:
        count, phase = len(sequences), self._decode_phase(len(sequences))
        ids = self._ids(tokens * count).reshape(tokens, count)
        sampler = Sampler(SamplingParams())  # greedy
        best = [sampler.best] * count
        with self._executor.recorded() as recorder:
            start = time.perf_counter()
            for token in ids:
                logits = self._executor.decode(list(sequences), token, phase, best)
                for row in logits:  # takes its time; what comes next is random all the same
                    sampler.sample(row)
            seconds = time.perf_counter() - start
        _check(logits)
        kernels = sum(recorder.by_step().values())
        by_step = recorder.with_python(phase)
        return _Steps(seconds, recorder.native_seconds(), kernels, by_step)

    def _warm(self) -> None:
        """Read what prompts and steps read, so that no measured one maps pages or compiles."""
        limits = self.plan.limits
        self._prefill(min(limits.max_chunk, limits.max_context))
        with self._sequences(0, 1) as sequences:
            self._steps(sequences, min(_WARM_STEPS, limits.max_context))

    def _sequences(self, context: int, count: int) -> AbstractContextManager[list[CacheSequence]]:
        return opened(self._executor, [self._ids(context) for _ in range(count)])

    def _ids(self, count: int) -> Ids:
        return self._random.integers(0, self.plan.model.vocab, count, np.int32)


@contextmanager
def opened(executor: Executor, prompts: Sequence[Ids]) -> Iterator[list[CacheSequence]]:
    """New sequences, each behind the tokens of its prompt, for the length of a `with`."""
    sequences: list[CacheSequence] = []
    try:
        for ids in prompts:
            sequences.append(executor.open())
            if len(ids):
                for _ in executor.prefill(sequences[-1], ids):
                    pass
        yield sequences
    finally:
        for sequence in sequences:
            executor.release(sequence)


def prefill_seconds(executor: Executor, ids: Ids, phase: str = "") -> float:
    """Seconds of a prompt of a sequence of its own, up to the logits of its last token."""
    with opened(executor, [ids[:0]]) as (sequence,):
        start = time.perf_counter()
        *_, logits = executor.prefill(sequence, ids, phase=phase)
        seconds = time.perf_counter() - start
    _check(logits)
    return seconds


def check_tests(
    plan: Plan, prompts: Sequence[int], tokens: int, context: int, batches: Sequence[int] = (1,)
) -> None:
    """Raise `ContextLengthError` when a test is longer than the plan's context, `UsageError` when
    there is none or it has more sequences than the plan."""
    if max(batches) > plan.limits.max_batch:
        raise UsageError(
            f"--batch {max(batches)}: the plan takes {plan.limits.max_batch} sequences; compile it"
            " with a larger --concurrency"
        )
    if not prompts and not tokens:
        raise UsageError("nothing to measure: give -p or -n")
    longest = max((*prompts, context + tokens))
    if longest > plan.limits.max_context:
        raise ContextLengthError(
            f"a test of {longest} tokens exceeds the plan's context of {plan.limits.max_context}:"
            " compile with a larger --max-context"
        )


def active_bytes(plan: Plan, batch: int = 1) -> int:
    """Bytes of weights and scales that a decode step of `batch` tokens reads: of the experts the
    distinct ones that so many tokens are expected to choose.
    """
    total = 0.0
    for step in plan.phase(DECODE).steps:
        chosen = 1.0
        if OPS[step.op].routed and batch > 1:
            experts, top_k = int(step.attrs["experts"]), int(step.attrs["top_k"])
            chosen = distinct_experts(experts, top_k, batch) / top_k
        total += step.weight_bytes * chosen
    return round(total)


def total_bytes(plan: Plan) -> int:
    """Bytes of all weights and scales."""
    plain = sum(weight.bytes for weight in plan.weights)
    return plain + sum(each.count * each.bytes for each in plan.experts)


def prefill_flops(plan: Plan, tokens: int) -> int:
    """FLOPs of the matmuls of a prompt: all tokens up to the gather, one row from there on."""
    total, rows = 0, tokens
    for step in plan.phase(PREFILL).steps:
        rows = 1 if OPS[step.op].picks else rows
        total += rows * step.flops
    return total


# -- where the time of a step goes -----------------------------------------------------------------


@dataclass(frozen=True)
class _Steps:
    """One repetition: seconds of the wall clock, in native programs, in kernels (mean over the
    workers), and the latter by step id."""

    seconds: float
    native: float
    kernels: float
    by_step: dict[int, float]


def _op_shares(phase: Phase, steps: Sequence[_Steps], tokens: int) -> list[dict[str, Any]]:
    """By op as JSON has it, what its records took of a step (mean over workers, medians over the
    repetitions): shares of the wall clock, largest first; `gbps` where weights are read.
    """
    ops: dict[str, list[int]] = defaultdict(list)
    for step in phase.steps:
        ops[step.op].append(step.id)
    size = {step.id: step.weight_bytes for step in phase.steps}
    rows: list[dict[str, Any]] = []
    for op, ids in ops.items():
        spent = [sum(each.by_step.get(i, 0.0) for i in ids) for each in steps]
        share = median(a / each.seconds for a, each in zip(spent, steps, strict=True))
        read = sum(size[i] for i in ids)
        seconds = median(spent) / tokens
        row: dict[str, Any] = {"op": op, "steps": len(ids), "share": round(share, 4)}
        row["microseconds"] = round(seconds * 1e6, 1)
        if read:
            row["gbps"] = round(read / seconds / 1e9, 2)
        rows.append(row)
    return sorted(rows, key=lambda row: -row["share"])


def _check(logits: npt.NDArray[np.float32]) -> None:
    if not np.isfinite(logits.max(axis=-1)).all():  # a screened head leaves -inf
        raise ExecutionError("the model gave logits that are not finite: these times mean nothing")
