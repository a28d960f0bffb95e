"""One generation: prefill, then sample and decode until something ends it; hides the loop, Ctrl-C,
clocks.

A generation frees its cache blocks however it ends.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

import numpy as np
import numpy.typing as npt

from hmc.runtime.executor import Executor
from hmc.runtime.kv import Sequence
from hmc.runtime.sampler import Sampler
from hmc.runtime.text import StopStrings, Text

FinishReason = Literal["stop", "length", "cancelled"]


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

    `finish_reason`: "stop" (EOS or a stop string), "length" (max_new_tokens or the context is full)
    or "cancelled". `text` is "" for a checkpoint without a tokenizer.
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


class Stream:
    """A generation under way: iterate over its pieces, or `close` it early; `result` is what there
    is so far.

    Ctrl-C while it computes ends the iteration and marks it cancelled; the cache blocks are freed
    in every case.
    """

    def __init__(
        self,
        executor: Executor,
        text: Text | None,
        ids: npt.NDArray[np.int32],
        sampler: Sampler,
        limits: Ends,
    ) -> None:
        self._run = _Run(executor, text, ids, sampler, limits)
        self._pieces = self._run.pieces()

    @property
    def result(self) -> Generation:
        """Everything generated up to now; final once the iteration has ended."""
        return self._run.result()

    def __iter__(self) -> Iterator[Piece]:
        return self

    def __next__(self) -> Piece:
        try:
            return next(self._pieces)
        except KeyboardInterrupt:
            self._pieces.close()
            raise StopIteration from None

    def close(self) -> None:
        """End the generation and free its cache blocks."""
        self._pieces.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        self.close()
        return kind is KeyboardInterrupt


@dataclass
class _Run:
    """The state of one generation, and the loop."""

    executor: Executor
    tokenizer: Text | None
    ids: npt.NDArray[np.int32]
    sampler: Sampler
    ends: Ends
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason = "cancelled"
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0

    def pieces(self) -> Generator[Piece, None, None]:
        """Prefill, then sample and decode until something ends it."""
        self.started = time.perf_counter()
        tail = self.ids[-16:].tolist()
        detokenizer = self.tokenizer.detokenizer(tail) if self.tokenizer else None
        with opened(self.executor) as sequence:
            *_, logits = self.executor.prefill(sequence, self.ids)
            while True:
                token = self.sampler.sample(logits[0])
                self.tokens.append(token)
                self.last = time.perf_counter()
                self.first = self.first or self.last
                ended = token in self.ends.eos_token_ids
                piece, stopped = "", False
                if detokenizer is not None and not ended:
                    piece, stopped = self.ends.stop.push(detokenizer.push(token))
                full = len(self.tokens) >= self.ends.max_new_tokens
                full |= sequence.length >= self.executor.plan.limits.max_context
                if (ended or full) and detokenizer is not None and not stopped:
                    rest, stopped = self._rest(detokenizer.flush())
                    piece += rest
                self.text += piece
                if ended or stopped or full:
                    self.reason = "stop" if ended or stopped else "length"
                yield Piece(piece, (token,))
                if ended or stopped or full:
                    return
                logits = self.executor.decode([sequence], np.array([token], np.int32))

    def _rest(self, held: str) -> tuple[str, bool]:
        """What is left to give out once no more tokens come, and whether it holds a stop string."""
        more, stopped = self.ends.stop.push(held)
        return more + ("" if stopped else self.ends.stop.flush()), stopped

    def result(self) -> Generation:
        ttft = self.first - self.started if self.first else 0.0
        total = self.last - self.started if self.last else 0.0
        timings = Timings(len(self.ids), len(self.tokens), ttft, total)
        return Generation(self.text, tuple(self.tokens), self.reason, timings)


@contextmanager
def opened(executor: Executor) -> Iterator[Sequence]:
    """A sequence for the length of a `with`."""
    sequence = executor.open()
    try:
        yield sequence
    finally:
        executor.release(sequence)
