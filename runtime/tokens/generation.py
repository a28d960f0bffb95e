"""One generation: prefill, then sample and decode until something ends it; hides the loop, Ctrl-C,
clocks.

A generation frees its cache blocks however it ends, but for those that a conversation keeps
(kept.py).
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.tokens.emoji import WholeEmoji
from hmc.runtime.tokens.kept import Kept
from hmc.runtime.tokens.sampler import Sampler
from hmc.runtime.tokens.text import Detokenizer, StopStrings, Text

FinishReason = Literal["stop", "length", "cancelled", "error"]

_TAIL = 16  # prompt tokens a detokeniser may want to see


@dataclass(frozen=True)
class Timings:
    """How long a generation took. `ttft_s` runs from the call to the first token; decoding counts
    what comes after it.
    """

    prompt_tokens: int
    new_tokens: int
    ttft_s: float
    total_s: float

    @property
    def prompt_tokens_per_second(self) -> float:
        """Prompt tokens over the time to the first token; 0 when none came."""
        return self.prompt_tokens / self.ttft_s if self.ttft_s > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first over the time after the first; 0 when there are none."""
        after = self.total_s - self.ttft_s
        return (self.new_tokens - 1) / after if self.new_tokens > 1 and after > 0 else 0.0


@dataclass(frozen=True)
class Generation:
    """What was generated: `token_ids` with the EOS token that ended it, `text` without it and
    without a stop string.

    `finish_reason`: "stop" (EOS or a stop string), "length" (max_new_tokens or the context is
    full), "cancelled", or "error" (a scheduler's request that failed). `text` is "" for a
    checkpoint without a tokenizer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """One token and the text that became certain with it ("" while a character or a stop string is
    half there).
    """

    text: str
    token_ids: tuple[int, ...]


@dataclass(frozen=True)
class Ends:
    """What ends a generation besides a full context; `stop` remembers text, so one use each."""

    max_new_tokens: int
    eos_token_ids: tuple[int, ...]
    stop: StopStrings


class Answer:
    """What one sequence has said so far, and when: takes tokens, gives out text that is certain,
    knows when it ends.

    `reason` is None until it ends. `context` is how many tokens a sequence may hold.
    """

    def __init__(
        self,
        tokenizer: Text | None,
        ids: npt.NDArray[np.int32],
        ends: Ends,
        context: int,
    ) -> None:
        tail = ids[-_TAIL:].tolist()
        self._detokenizer = Detokenizer(tokenizer, tail) if tokenizer else None
        self._ends = ends
        self._emoji = WholeEmoji()
        # The last token is never stored, so a full context still gives one more.
        self._most = min(ends.max_new_tokens, context - len(ids) + 1)
        self.tokens: list[int] = []
        self.text = ""
        self.reason: FinishReason | None = None
        self._prompt_tokens = len(ids)
        self._began = time.perf_counter()
        self._first = self._last = 0.0

    def push(self, token: int) -> str:
        """Append a token that was sampled now; the text that became certain with it."""
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens.append(token)
        ended = token in self._ends.eos_token_ids
        piece, stopped = "", False
        if self._detokenizer is not None and not ended:
            piece, stopped = self._ends.stop.push(self._detokenizer.push(token))
        full = len(self.tokens) >= self._most
        if (ended or full) and self._detokenizer is not None and not stopped:
            rest, stopped = self._rest(self._detokenizer.flush())
            piece += rest
        piece = self._emoji.push(piece)
        if ended or stopped or full:
            self.reason = "stop" if ended or stopped else "length"
            piece += self._emoji.flush()
        self.text += piece
        return piece

    def _rest(self, held: str) -> tuple[str, bool]:
        """What is left to give out once no more tokens come, and whether it holds a stop string."""
        more, stopped = self._ends.stop.push(held)
        return more + ("" if stopped else self._ends.stop.flush()), stopped

    @property
    def timings(self) -> Timings:
        """Of what there is so far."""
        ttft, total = (at - self._began if at else 0.0 for at in (self._first, self._last))
        return Timings(self._prompt_tokens, len(self.tokens), ttft, total)

    def generation(self, reason: FinishReason) -> Generation:
        """All of it, ended for a reason."""
        return Generation(self.text, tuple(self.tokens), reason, self.timings)


class Stream:
    """A generation under way: iterate over its pieces, or `cancel` or `close` it early; `result` is
    what there is so far.

    Ctrl-C while it computes ends the iteration and marks it cancelled; the cache blocks are freed
    in every case.
    """

    def __init__(
        self,
        executor: Executor,
        text: Text | None,
        ids: npt.NDArray[np.int32],
        sampler: Sampler,
        ends: Ends,
        kept: Kept | None = None,
    ) -> None:
        """`kept` holds the sequence before and afterwards; without, it is opened and released."""
        self.cached_tokens = 0
        """Tokens of the prompt that were in the cache already."""
        self._answer = Answer(text, ids, ends, executor.plan.limits.max_context)
        self._cancelled = False
        self._pieces = self._run(executor, ids, sampler, kept)

    @property
    def result(self) -> Generation:
        """Everything generated up to now; final once the iteration has ended."""
        return self._answer.generation(self._answer.reason or "cancelled")

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except KeyboardInterrupt:
            self._pieces.close()
            raise StopIteration from None

    def cancel(self) -> None:
        """End the generation after the call under way; for signal handlers and other threads."""
        self._cancelled = True

    def close(self) -> None:
        """End the generation and free its cache blocks."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> bool:
        self.close()
        return kind is KeyboardInterrupt

    def _run(
        self, executor: Executor, ids: npt.NDArray[np.int32], sampler: Sampler, kept: Kept | None
    ) -> Generator[Piece, None, None]:
        """Prefill what is not there yet, then sample and decode until something ends it."""
        place = kept.holding(ids, self._answer.tokens) if kept else opened(executor)
        with place as sequence:
            self.cached_tokens = sequence.length
            logits = np.empty((0, 0), np.float32)
            for chunk in executor.prefill(sequence, ids[sequence.length :]):
                logits = chunk
                if kept:
                    kept.grown(sequence, ids)
                if self._cancelled:
                    return
            while not self._cancelled:
                token = sampler.sample(logits[0])
                yield Piece(self._answer.push(token), (token,))
                if self._answer.reason is not None or self._cancelled:
                    return
                last = np.array([token], np.int32)
                logits = executor.decode([sequence], last, "", [sampler.best])


@contextmanager
def opened(executor: Executor) -> Iterator[Sequence]:
    """A sequence for the length of a `with`."""
    sequence = executor.open()
    try:
        yield sequence
    finally:
        executor.release(sequence)
