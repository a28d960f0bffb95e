"""Figures of a load test: latencies by percentile, throughput, goals met; and one long prompt
beside decoding requests against both alone.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import numpy as np

from hmc.bench.serve.client import Reply, Target, all_good
from hmc.bench.serve.load import Shot
from hmc.plan import Goals

_PERCENTILES = (50, 90, 99)


def load(
    target: Target, shots: Sequence[Shot], *, concurrency: int, seed: int, goals: Goals
) -> dict[str, Any]:
    """Send a load and time it: `figures`, and as "scheduler_own_share" the part of the scheduler's
    steps that was not spent in the executor (sampling, text, hand-over), None when no step was
    made.
    """
    before = target.live()
    replies = target.run(shots, concurrency=concurrency, seed=seed)
    after = target.live()
    steps, executor = (
        after[name] - before[name] for name in ("step_seconds_total", "executor_seconds")
    )
    own = 1 - executor / steps if steps > 0 else None
    return figures(replies, goals) | {"scheduler_own_share": own}


def figures(replies: Sequence[Reply], goals: Goals) -> dict[str, Any]:
    """What came of a load: seconds, tokens a second and shares."""
    good = [reply for reply in replies if not reply.error]
    start = min((r.begun for r in good), default=0.0)
    span = max((r.begun + r.total for r in good), default=0.0) - start
    tokens = sum(reply.tokens for reply in good)
    met = [reply for reply in good if _meets(reply, goals)]
    return {
        "requests": len(replies),
        "failed": len(replies) - len(good),
        "errors": sorted({reply.error for reply in replies if reply.error})[:5],
        "seconds": span,
        "prompt_tokens": sum(reply.shot.prompt for reply in good),
        "output_tokens": tokens,
        "output_tokens_per_second": tokens / span if span > 0 else None,
        "requests_per_second": len(good) / span if span > 0 else None,
        "ttft": percentiles([reply.ttft for reply in good]),
        "tpot": percentiles([r.tpot for r in good if r.tpot is not None]),
        "total": percentiles([reply.total for reply in good]),
        "slo": {"ttft": goals.ttft_seconds or None, "tps": goals.tokens_per_second or None},
        "slo_attainment": len(met) / len(replies),
    }


def _meets(reply: Reply, goals: Goals) -> bool:
    """Whether an answer meets the goals; one of a single token has no pace."""
    late = goals.ttft_seconds and reply.ttft > goals.ttft_seconds
    slow = goals.tokens_per_second and reply.tpot and 1 / reply.tpot < goals.tokens_per_second
    return not (late or slow)


def beside(
    target: Target, decodes: int, *, prompt: int, short: int, output: int, seed: int
) -> dict[str, float]:
    """One prompt of `prompt` tokens that arrives while `decodes` requests of `short` tokens write
    `output` tokens each: seconds of each alone and together, and their ratios. Decoding counts the
    tokens of the whole answer, of which the prompt's time is only a part: with outputs long enough
    to outlast the prompt, `tpot_together` is what a user sees over the answer.

    Raises `ExecutionError` when a request fails.
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
    together = _median_tpot(others)
    return {
        "prompt": prompt,
        "decodes": decodes,
        "ttft_alone": single.ttft,
        "ttft_together": long.ttft,
        "tpot_alone": pace,
        "tpot_together": together,
        "ttft_rise": long.ttft / single.ttft - 1,
        "tpot_factor": together / pace,
    }


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p90, p99 and the mean; None without values."""
    if not values:
        return {**{f"p{p}": None for p in _PERCENTILES}, "mean": None}
    found = {f"p{p}": float(np.percentile(values, p)) for p in _PERCENTILES}
    return {**found, "mean": statistics.fmean(values)}


def _median_tpot(replies: Sequence[Reply]) -> float:
    return statistics.median(reply.tpot for reply in replies if reply.tpot is not None)
