"""What a scheduler counts and times, and its figures at one moment."""

from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from hmc.runtime.memory.kv import KVCache
from hmc.runtime.prefill.worker import PrefillState
from hmc.runtime.tokens.generation import Clock

_RECENT = 256


@dataclass(frozen=True)
class StepTime:
    """One step: `decoded` sequences got a token from a decode call, `prefilled` prompt tokens were
    computed; `executor` of its `seconds` were spent in the executor's calls.
    """

    seconds: float
    executor: float
    decoded: int
    prefilled: int


@dataclass(frozen=True)
class SchedulerStats:
    """A scheduler at one moment; counts are since its start.

    running, prefilling, waiting   requests that decode, whose prompt is computed, that queue
    kv_used, kv_cached, kv_total   blocks that sequences own, that are kept for reuse, that exist
    snapshots, snapshots_total     states a sequence kept for reuse, and room for them; 0 of 0 where
                                   layers keep none (or none is kept: then no prompt is reused)
    tokens_generated               tokens sampled
    prompt_tokens                  prompt tokens computed; those reused are in `prefix_tokens`
    prefix_hits, prefix_tokens     prompts that began with known blocks, and their tokens
    steps, recent                  steps made, and the times of the last 256
    executor_seconds, step_seconds_total  seconds in the executor, and in steps altogether
    batch                          sequences in the last decode call
    phase, step_age                phase being computed ("": none), seconds since the step began
    finished                       ended requests by finish reason
    error                          why the scheduler has stopped; "": it works
    prefill                        the prefill process; None: there is none
    """

    running: int
    prefilling: int
    waiting: int
    kv_used: int
    kv_cached: int
    kv_total: int
    snapshots: int
    snapshots_total: int
    tokens_generated: int
    prompt_tokens: int
    prefix_hits: int
    prefix_tokens: int
    steps: int
    recent: tuple[StepTime, ...]
    executor_seconds: float
    step_seconds_total: float
    batch: int
    phase: str
    step_age: float
    finished: Mapping[str, int]
    error: str
    prefill: PrefillState | None = None

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Seconds of each recent step."""
        return tuple(step.seconds for step in self.recent)

    def own_share(self, batch: int) -> float | None:
        """The share of a step that is the scheduler's own (sampling, text, listeners, bookkeeping)
        over the recent steps that did nothing but decode `batch` sequences; None: there were none.
        """
        steps = [s for s in self.recent if s.decoded == batch and not s.prefilled]
        total = sum(step.seconds for step in steps)
        return 1 - sum(step.executor for step in steps) / total if total else None


class Meter:
    """Counts as the scheduler's thread works; `snapshot` may be called from any thread."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._recent: deque[StepTime] = deque(maxlen=_RECENT)
        self._began: float | None = None
        self._finished: Counter[str] = Counter()
        self._inside = 0.0
        self._decoded = self._prefilled = 0
        self._executor_seconds = self._step_seconds = 0.0
        self._phase = ""
        self._batch = self._steps = 0
        self._called = False
        self._tokens = self._prompt_tokens = self._prefix_hits = self._prefix_tokens = 0

    @property
    def step_age(self) -> float:
        """Seconds since the step under way began; 0 between steps."""
        began = self._began
        return 0.0 if began is None else max(0.0, self._clock() - began)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step for the length of a `with`; counted if it called the executor."""
        self._called = False
        self._inside, self._decoded, self._prefilled = 0.0, 0, 0
        self._began = self._clock()
        try:
            yield
        finally:
            seconds = self._clock() - self._began
            self._began = None
            if self._called:
                with self._lock:
                    self._steps += 1
                    self._step_seconds += seconds
                    self._executor_seconds += self._inside
                    self._recent.append(
                        StepTime(seconds, self._inside, self._decoded, self._prefilled)
                    )

    @contextmanager
    def call(self, phase: str, *, decoded: int = 0, prefilled: int = 0) -> Iterator[None]:
        """A call of the executor for the length of a `with`; counted when it succeeds."""
        self._phase, self._called = phase, True
        began = self._clock()
        try:
            yield
        finally:
            self._inside += self._clock() - began
            self._phase = ""
        self._decoded += decoded
        self._batch = decoded or self._batch
        self._prefilled += prefilled
        self._prompt_tokens += prefilled

    def handed_over(self, tokens: int) -> None:
        """Count prompt tokens that were computed beside."""
        self._prompt_tokens += tokens

    def sampled(self) -> None:
        """Count a generated token."""
        self._tokens += 1

    def reused(self, tokens: int) -> None:
        """Count a prompt that began with `tokens` known tokens; none: no hit."""
        self._prefix_hits += tokens > 0
        self._prefix_tokens += tokens

    def ended(self, reason: str) -> None:
        """Count an ended request."""
        with self._lock:
            self._finished[reason] += 1

    def snapshot(
        self,
        kv: KVCache,
        *,
        running: int,
        prefilling: int,
        waiting: int,
        error: str,
        prefill: PrefillState | None = None,
    ) -> SchedulerStats:
        """The figures now, with those that the meter does not know."""
        with self._lock:
            return SchedulerStats(
                running=running,
                prefilling=prefilling,
                waiting=waiting,
                kv_used=kv.allocator.used,
                kv_cached=kv.allocator.cached,
                kv_total=kv.allocator.count,
                snapshots=len(kv.snapshots),
                snapshots_total=kv.layout.snapshots,
                tokens_generated=self._tokens,
                prompt_tokens=self._prompt_tokens,
                prefix_hits=self._prefix_hits,
                prefix_tokens=self._prefix_tokens,
                steps=self._steps,
                recent=tuple(self._recent),
                executor_seconds=self._executor_seconds,
                step_seconds_total=self._step_seconds,
                batch=self._batch if running else 0,
                phase=self._phase,
                step_age=self.step_age,
                finished=dict(self._finished),
                error=error,
                prefill=prefill,
            )
