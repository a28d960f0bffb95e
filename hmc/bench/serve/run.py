"""Figures of a load test: latencies by percentile, throughput, goals met; and one long prompt
beside decoding requests against both alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from hmc.bench.serve.client import Reply, Target, all_good
from hmc.bench.serve.load import Shot, Slo

_PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Result:
    """What came of a load; `own_share` is the part of the scheduler's steps that was not spent in
    the executor (sampling, text, hand-over), None when no step was made.
    """

    replies: tuple[Reply, ...]
    slo: Slo
    own_share: float | None

    def as_json(self) -> dict[str, Any]:
        """Seconds, tokens a second and shares."""
        good = [reply for reply in self.replies if not reply.error]
        start = min((r.begun for r in good), default=0.0)
        span = max((r.begun + r.total for r in good), default=0.0) - start
        met = [r for r in good if self.slo.met(r.ttft, 1 / r.tpot if r.tpot else None)]
        return {
            "requests": len(self.replies),
            "failed": len(self.replies) - len(good),
            "errors": sorted({reply.error for reply in self.replies if reply.error})[:5],
            "seconds": span,
            "prompt_tokens": sum(reply.shot.prompt for reply in good),
            "output_tokens": sum(reply.tokens for reply in good),
            "output_tokens_per_second": _rate(sum(r.tokens for r in good), span),
            "requests_per_second": _rate(len(good), span),
            "ttft": percentiles([reply.ttft for reply in good]),
            "tpot": percentiles([r.tpot for r in good if r.tpot is not None]),
            "total": percentiles([reply.total for reply in good]),
            "slo": vars(self.slo),
            "slo_attainment": len(met) / len(self.replies),
            "scheduler_own_share": self.own_share,
        }


def load(target: Target, shots: Sequence[Shot], *, concurrency: int, seed: int, slo: Slo) -> Result:
    """Send a load and time it."""
    before = target.live()
    replies = target.run(shots, concurrency=concurrency, seed=seed)
    after = target.live()
    steps = after["step_seconds_total"] - before["step_seconds_total"]
    executor = after["executor_seconds"] - before["executor_seconds"]
    return Result(tuple(replies), slo, 1 - executor / steps if steps > 0 else None)


@dataclass(frozen=True)
class Beside:
    """One prompt and N decoding requests, each alone and together; seconds. Decoding counts the
    tokens of the whole answer, of which the prompt's time is only a part: with outputs long
    enough to outlast the prompt, `tpot_together` is what a user sees over the answer.
    """

    prompt: int
    decodes: int
    ttft_alone: float
    ttft_together: float
    tpot_alone: float
    tpot_together: float

    def as_json(self) -> dict[str, Any]:
        """With the ratios."""
        return {
            **self.__dict__,
            "ttft_rise": self.ttft_together / self.ttft_alone - 1,
            "tpot_factor": self.tpot_together / self.tpot_alone,
        }


def beside(
    target: Target, decodes: int, *, prompt: int, short: int, output: int, seed: int
) -> Beside:
    """Measure one prompt of `prompt` tokens that arrives while `decodes` requests of `short` tokens
    write `output` tokens each; raises `ExecutionError` when a request fails.
    """
    decoding = [Shot(0.0, short, output) for _ in range(decodes)]
    all_good(target.run([Shot(0.0, short, 4)], concurrency=0, seed=seed))  # the first one is slow
    alone = all_good(target.run(decoding, concurrency=0, seed=seed + 1))
    pace = _median_tpot(alone)
    (single,) = all_good(target.run([Shot(0.0, prompt, 1)], concurrency=0, seed=seed + 2))
    # Once all decode: the slowest first token, and a few steps more.
    arrival = max(reply.ttft for reply in alone) + 4 * pace
    both = [*decoding, Shot(arrival, prompt, 1)]
    *others, long = all_good(target.run(both, concurrency=0, seed=seed + 3))
    return Beside(prompt, decodes, single.ttft, long.ttft, pace, _median_tpot(others))


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 and the mean; None without values."""
    if not values:
        return {**{f"p{p}": None for p in _PERCENTILES}, "mean": None}
    found = {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
    return {**found, "mean": statistics.fmean(values)}


def _median_tpot(replies: Sequence[Reply]) -> float:
    return statistics.median(reply.tpot for reply in replies if reply.tpot is not None)


def _rate(amount: float, seconds: float) -> float | None:
    return amount / seconds if seconds > 0 else None
