"""What a server costs beside its executor: N equal streams, and how much of a decode step's wall
time the executor does not fill.

    1. N answers asked for as a whole: nothing is sent while they are computed, so these steps show
       what the executor takes when no HTTP and no client disturb it.
    2. The same N as streams, one part a token: the time between two tokens of a stream, while all N
       are running, is the wall time of a step.
    3. The server's share of a step is what is left of 2 without the executor's seconds of 1. So it
       also holds what the executor loses to threads that write and, on one machine, to the client
       that reads; the client's processor time is told beside it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from typing import Any

from hmc.bench.serve.client import Reply, Target, all_good
from hmc.bench.serve.load import Shot
from hmc.errors import ExecutionError

_LEAST = 8  # steps from which a mean says something


def streams(target: Target, count: int, *, prompt: int, output: int, seed: int) -> dict[str, float]:
    """`count` answers of `output` tokens to prompts of `prompt` tokens: seconds, means over the
    decode steps of all of them.

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
    all_good(target.run([Shot(0.0, prompt, 4)], concurrency=0, seed=seed))  # the first one is slow
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
