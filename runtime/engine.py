"""The engine: a plan and its checkpoint in, text or logits out. Text and sampling here, computing in runtime/executor.py.

with Engine(plan) as engine:
    print(engine.generate("In the beginning", max_new_tokens=40).text)
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from collections.abc import Sequence as Items
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from hmc.errors import ContextLengthError, UsageError
from hmc.plan import Plan
from hmc.runtime.executor import Executor, Logits
from hmc.runtime.kv import Sequence
from hmc.runtime.sampler import Sampler, SamplingParams
from hmc.runtime.text import StopStrings, Text
from hmc.runtime.weights import Home, Progress

FinishReason = Literal["stop", "length", "cancelled"]

_DEFAULT_NEW_TOKENS = 256


@dataclass(frozen=True)
class Timings:
    """How long a generation took. `ttft_s` runs from the call to the first token; decoding counts what comes after it."""

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
    """What was generated: `token_ids` with the EOS token that ended it, `text` without it and without a stop string.

    `finish_reason`: "stop" (EOS or a stop string), "length" (max_new_tokens or the context is full) or "cancelled".
    `text` is "" for a checkpoint without a tokenizer.
    """

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings


@dataclass(frozen=True)
class Piece:
    """One token and the text that became certain with it ("" while a character or a stop string is half there)."""

    text: str
    token_ids: tuple[int, ...]


class Engine:
    """Runs a plan. A context manager; `close` frees everything, and using a closed engine is an `ExecutionError`.

    `checkpoint` defaults to the directory the plan was made from. `dummy_weights` runs random weights of the plan's
    shapes. `home` says where weights live: "mapped" (in the page cache) or "arena" (copied to huge pages).
    """

    def __init__(
        self,
        plan: Plan,
        checkpoint: str | Path | None = None,
        *,
        threads: int | None = None,
        dummy_weights: bool = False,
        home: Home = "mapped",
        progress: Progress | None = None,
    ) -> None:
        """Refuses with the cause named: `PlanMismatchError`, `MachineError`, `CapacityError`, `ShardError`."""
        directory = Path(checkpoint or plan.checkpoint.path)
        self.plan = plan
        self.text = Text.open(directory)
        self.executor = Executor(
            plan,
            directory,
            threads=threads,
            dummy_weights=dummy_weights,
            home=home,
            progress=progress,
        )

    def logits(self, token_ids: Items[int]) -> Logits:
        """Logits f32 [tokens, vocab] of every token of a prompt, by the prefill path."""
        ids = self._token_ids(token_ids)
        with _Open(self.executor) as sequence:
            parts = [part.copy() for part in self.executor.prefill(sequence, ids, every=True)]
        return np.concatenate(parts)

    def decode_logits(self, token_ids: Items[int]) -> Logits:
        """The same token by token, by the decode path."""
        ids = self._token_ids(token_ids)
        with _Open(self.executor) as sequence:
            rows = [
                self.executor.decode([sequence], ids[i : i + 1]).copy() for i in range(len(ids))
            ]
        return np.concatenate(rows)

    def generate(
        self,
        prompt: str | Items[int],
        *,
        max_new_tokens: int = _DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Items[str] | None = None,
    ) -> Generation:
        """Continue a text or a list of token ids. Arguments left None come from generation_config.json, else greedy.

        Ctrl-C ends it with what there is, `finish_reason` "cancelled". Raises `UsageError` for an empty prompt or a
        bad argument, `ContextLengthError` for a prompt longer than the context.
        """
        stream = self.stream(
            prompt,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            min_p=min_p,
            repetition_penalty=repetition_penalty,
            seed=seed,
            stop=stop,
        )
        with stream:
            for _ in stream:
                pass
        return stream.result

    def stream(
        self,
        prompt: str | Items[int],
        *,
        max_new_tokens: int = _DEFAULT_NEW_TOKENS,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        repetition_penalty: float | None = None,
        seed: int | None = None,
        stop: str | Items[str] | None = None,
    ) -> Stream:
        """As `generate`, token by token: iterate over `Piece`s, then read `.result`."""
        if (
            isinstance(max_new_tokens, bool)
            or not isinstance(max_new_tokens, int)
            or max_new_tokens < 1
        ):
            raise UsageError(f"max_new_tokens={max_new_tokens}: must be a whole number >= 1")
        explicit = {
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "min_p": min_p,
            "repetition_penalty": repetition_penalty,
            "seed": seed,
        }
        params = SamplingParams.resolve(explicit, self.text.generation_config if self.text else {})
        if stop and self.text is None:
            raise UsageError(
                "stop: this checkpoint has no tokenizer, so there is no text to stop at"
            )
        ids = self._token_ids(self._encode(prompt) if isinstance(prompt, str) else prompt)
        return Stream(self, ids, params, max_new_tokens, StopStrings(stop))

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end an answer: the checkpoint's, else the plan's."""
        return (self.text.eos_token_ids if self.text else ()) or self.plan.model.eos_token_ids

    @property
    def kernels_used(self) -> tuple[str, ...]:
        """Symbols of the native kernels (their names hold the ISA) and PyTorch functions that have really run."""
        return self.executor.kernels_used

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        self.executor.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def _encode(self, prompt: str) -> list[int]:
        if self.text is None:
            raise UsageError("this checkpoint has no tokenizer: give token ids instead of text")
        if not prompt:
            raise UsageError("the prompt is empty: give at least one character")
        return self.text.encode(prompt)

    def _token_ids(self, ids: Items[int]) -> npt.NDArray[np.int32]:
        """`ids` as i32, at least one, all in the vocabulary, no more than the context."""
        if len(ids) == 0:
            raise UsageError("the prompt is empty: give at least one token")
        vocab, context = self.plan.model.vocab, self.plan.limits.max_context
        array = np.asarray(ids)
        if array.ndim != 1 or array.dtype.kind not in "iu":
            raise UsageError("token ids must be a list of whole numbers")
        wrong = np.flatnonzero((array < 0) | (array >= vocab))
        if len(wrong):
            at = int(wrong[0])
            raise UsageError(
                f"token id {array[at]} at place {at} is outside the vocabulary: 0..{vocab - 1}"
            )
        if len(array) > context:
            raise ContextLengthError(
                f"the prompt has {len(array)} tokens, the plan's context holds {context}:"
                " shorten it or compile with a larger --max-context"
            )
        return array.astype(np.int32)


class Stream:
    """A generation under way: iterate over its pieces, or `close` it early; `result` is what there is so far.

    Ctrl-C while it computes ends the iteration and marks it cancelled; the cache blocks are freed in every case.
    """

    def __init__(
        self,
        engine: Engine,
        ids: npt.NDArray[np.int32],
        params: SamplingParams,
        max_new_tokens: int,
        stop: StopStrings,
    ) -> None:
        self._run = _Run(engine, ids, Sampler(params, ids.tolist()), max_new_tokens, stop)
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

    engine: Engine
    ids: npt.NDArray[np.int32]
    sampler: Sampler
    max_new_tokens: int
    stop: StopStrings
    text: str = ""
    tokens: list[int] = field(default_factory=list)
    reason: FinishReason = "cancelled"
    started: float = field(default_factory=time.perf_counter)
    first: float = 0.0
    last: float = 0.0

    def pieces(self) -> Iterator[Any]:
        """Prefill, then sample and decode until something ends it."""
        executor, text = self.engine.executor, self.engine.text
        self.started = time.perf_counter()
        detokenizer = text.detokenizer(self.ids[-16:].tolist()) if text else None
        with _Open(executor) as sequence:
            logits = np.empty((0, 0), np.float32)
            for logits in executor.prefill(sequence, self.ids):
                pass
            while True:
                token = self.sampler.sample(logits[0])
                self.tokens.append(token)
                self.last = time.perf_counter()
                self.first = self.first or self.last
                ended = token in self.engine.eos_token_ids
                piece, stopped = "", False
                if detokenizer is not None and not ended:
                    piece, stopped = self.stop.push(detokenizer.push(token))
                full = len(self.tokens) >= self.max_new_tokens
                full |= sequence.length >= self.engine.plan.limits.max_context
                if ended or stopped or full:
                    self.reason = "stop" if ended or stopped else "length"
                    if detokenizer is not None and not stopped:
                        piece, stopped = self._rest(piece, detokenizer.flush())
                        self.reason = "stop" if stopped else self.reason
                self.text += piece
                yield Piece(piece, (token,))
                if ended or stopped or full:
                    return
                logits = executor.decode([sequence], np.array([token], np.int32))

    def _rest(self, piece: str, held: str) -> tuple[str, bool]:
        more, stopped = self.stop.push(held)
        return piece + more + ("" if stopped else self.stop.flush()), stopped

    def result(self) -> Generation:
        ttft = self.first - self.started if self.first else 0.0
        total = self.last - self.started if self.last else 0.0
        timings = Timings(len(self.ids), len(self.tokens), ttft, total)
        return Generation(self.text, tuple(self.tokens), self.reason, timings)


class _Open:
    """A sequence for the length of a `with`."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def __enter__(self) -> Sequence:
        self._sequence = self._executor.open()
        return self._sequence

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._executor.release(self._sequence)
