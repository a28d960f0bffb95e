"""A plan in memory: what it answers greedily and how fast it is; and two plans taking turns."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from hmc.bench.compare import Compared, in_turn
from hmc.bench.model import Ids, opened, prefill_seconds
from hmc.closing import Closing
from hmc.plan import Plan
from hmc.runtime.executor import Executor
from hmc.runtime.phases.choice import Devices

_PROMPTS = (5, 23, 130)
_ANSWER = 16
_LEAST_SECONDS = 0.2
"""Seconds that a pass takes at least: it is repeated until then."""


class Runner(Closing):
    """One plan ready to run; a context manager. `tokens` are decoded behind `context` others, and
    prompts of `prompt` tokens are taken; all clipped to the plan's context.
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: str = "",
        *,
        dummy_weights: bool = False,
        prompt: int = 1024,
        context: int = 128,
        tokens: int = 16,
        devices: Devices = "auto",
    ) -> None:
        """Raises what `Executor` raises."""
        self.plan = plan
        limit = plan.limits.max_context
        self._prompt = min(prompt, limit)
        self._tokens = min(tokens, max(1, limit // 2))
        self._context = min(context, limit - self._tokens)
        directory = Path(checkpoint or plan.checkpoint.path)
        self._executor = Executor(plan, directory, dummy_weights=dummy_weights, devices=devices)

    def close(self) -> None:
        """Free everything."""
        self._executor.close()

    @property
    def loads(self) -> tuple[int, int]:
        """Prompt tokens of `prefill_rate`; context in the middle of `decode_rate`."""
        return self._prompt, self._context + self._tokens // 2

    def greedy(self) -> list[list[int]]:
        """Greedy continuations of a few prompts of random ids, the same for every plan."""
        answers = []
        room = self.plan.limits.max_context
        for number, length in enumerate(_PROMPTS):
            ids = self._ids(max(1, min(length, room - _ANSWER)), seed=number)
            with opened(self._executor, [ids[:0]]) as (sequence,):
                *_, logits = self._executor.prefill(sequence, ids)
                answer = [int(np.argmax(logits[-1]))]
                for _ in range(min(_ANSWER, room - len(ids)) - 1):
                    last = np.array(answer[-1:], np.int32)
                    logits = self._executor.decode([sequence], last, best=[1])
                    answer.append(int(np.argmax(logits[0])))
            answers.append(answer)
        return answers

    def decode_rate(self) -> float:
        """Tokens a second of one sequence."""
        ids = self._ids(self._context + self._tokens, seed=7)
        done, spent = 0, 0.0
        with opened(self._executor, [ids[: self._context]]) as (sequence,):
            while spent < _LEAST_SECONDS:
                sequence.length = self._context
                start = time.perf_counter()
                for index in range(self._context, len(ids)):
                    self._executor.decode([sequence], ids[index : index + 1], best=[1])
                spent += time.perf_counter() - start
                done += self._tokens
        return done / spent

    def prefill_rate(self) -> float:
        """Prompt tokens a second."""
        ids = self._ids(self._prompt, seed=8)
        seconds: list[float] = []
        while sum(seconds) < _LEAST_SECONDS:
            seconds.append(prefill_seconds(self._executor, ids))
        return self._prompt * len(seconds) / sum(seconds)

    def rate(self, kind: str) -> float:
        """The rate of a kind, "decode" or "prefill"."""
        return self.decode_rate() if kind == "decode" else self.prefill_rate()

    def _ids(self, count: int, seed: int) -> Ids:
        random = np.random.default_rng(seed)
        return random.integers(0, self.plan.model.vocab, count, np.int32)


def compare(new: Runner, old: Runner, kind: str, repetitions: int) -> Compared:
    """The new plan's rates, each between two of the old one's; both warmed up first."""
    old.rate(kind)
    new.rate(kind)
    (found,) = in_turn([lambda: new.rate(kind)], lambda: old.rate(kind), repetitions, kind)
    return found
