"""Figures of a load test: latencies by percentile, throughput, goals met; one long prompt beside
decoding requests against both alone; and what a server costs beside its executor.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from hmc.bench.serve.client import Reply, Target, all_good
from hmc.bench.serve.load import Shot
from hmc.errors import ExecutionError
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


_LEAST = 8  # steps from which a mean says something


def streams(target: Target, count: int, *, prompt: int, output: int, seed: int) -> dict[str, float]:
    """What a server costs beside its executor: `count` equal streams of `output` tokens behind
    prompts of `prompt` tokens, and how much of a decode step's wall time the executor does not
    fill.

    1. The answers asked for as a whole: nothing is sent while they are computed, so these steps
       show what the executor takes when no HTTP and no client disturb it.
    2. The same as streams, one part a token: the time between two tokens of a stream, while all
       are running, is the wall time of a step.
    3. The server's share of a step is what is left of 2 without the executor's seconds of 1. So it
       also holds what the executor loses to threads that write and, on one machine, to the client
       that reads; the client's processor time is told beside it.

    Seconds, means over the decode steps of all of them:

    step                a token of every stream, as the client sees it
    scheduler, executor the scheduler's step and, within it, the executor's calls
    undisturbed         the executor's calls while answers are not streamed
    whole               the scheduler's step then
    client_cpu          the client's own processor time

    With the shares of a step: `server_share` is all that the undisturbed executor does not fill,
    `scheduler_share` and `between_share` what is spent within and between the scheduler's steps,
    `executor_rise` what the executor's calls take longer while answers are streamed.

    Raises `ExecutionError` when a request fails or too few steps hold all of them.
    """
    shots = [Shot(0.0, prompt, output)] * count
    first = [Shot(0.0, prompt, 4)] * count  # the first steps of all of them are slow
    all_good(target.run(first, concurrency=0, seed=seed))
    made = target.steps()["steps"]
    all_good(target.run(shots, concurrency=0, seed=seed + 1, stream=False))
    whole, undisturbed, _ = full_steps(target.steps(), made, count)
    made, processor = target.steps()["steps"], time.process_time()
    replies = all_good(target.run(shots, concurrency=0, seed=seed + 2))
    processor = time.process_time() - processor
    after = target.steps()
    scheduler, executor, steps = full_steps(after, made, count)
    cpu, step = processor / (after["steps"] - made), pace(replies)
    return {
        "streams": count,
        "steps": steps,
        "step": step,
        "scheduler": scheduler,
        "executor": executor,
        "whole": whole,
        "undisturbed": undisturbed,
        "client_cpu": cpu,
        "server_share": 1 - undisturbed / step,
        "scheduler_share": (scheduler - executor) / step,
        "between_share": (step - scheduler) / step,
        "executor_rise": executor / undisturbed - 1,
        "client_share": cpu / step,
    }


def full_steps(found: Mapping[str, Any], since: int, count: int) -> tuple[float, float, int]:
    """Mean seconds, and of these in the executor, of the known steps after the first `since` that
    decoded `count` sequences and no prompt; and how many there were.
    """
    new = found["steps"] - since
    full = [step for step in found["recent"][-new:] if step[2] == count and not step[3]]
    if len(full) < _LEAST:
        raise ExecutionError(
            f"only {len(full)} steps decoded all {count} streams at once: ask for a longer --output"
            " or fewer streams; the plan's --concurrency has to allow them"
        )
    seconds, inside = (statistics.fmean(step[i] for step in full) for i in (0, 1))
    return seconds, inside, len(full)


def pace(replies: Sequence[Reply]) -> float:
    """Mean seconds between two parts of a stream while all were running."""
    begin = max(reply.stamps[0] for reply in replies)
    end = min(reply.stamps[-1] for reply in replies)
    paces = []
    for reply in replies:
        inside = [stamp for stamp in reply.stamps if begin <= stamp <= end]
        if len(inside) > _LEAST:
            paces.append((inside[-1] - inside[0]) / (len(inside) - 1))
    if not paces:
        raise ExecutionError("the streams did not run at the same time: ask for a longer --output")
    return statistics.fmean(paces)
