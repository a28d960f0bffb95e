"""What a scheduler counts and times, and its figures at one moment."""

from __future__ import annotations

import threading
import time
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

from hmc.runtime.memory.kv import KVCache
from hmc.runtime.prefill.worker import PrefillState

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


@dataclass
class SchedulerStats:
    """A scheduler at one moment; counts are since its start.

    running, prefilling, waiting   requests that decode, whose prompt is computed, that queue
    kv_used, kv_cached, kv_total   blocks that sequences own, that are kept for reuse, that exist
    snapshots, snapshots_total     states a sequence kept for reuse, and room for them; 0 of 0 where
                                   layers keep none (or none is kept: then no prompt is reused)
    tokens_generated               tokens sampled
    prompt_tokens                  prompt tokens computed; those reused are in `prefix_tokens`
    prefix_hits, prefix_tokens     prompts that began with known blocks, and their tokens
    preemptions, tokens_restored   requests that made room for others, and tokens of their answers
                                   that were stored again
    steps, recent                  steps made, and the times of the last 256
    executor_seconds, step_seconds_total  seconds in the executor, and in steps altogether
    batch                          sequences in the last decode call
    phase, step_age                phase being computed ("": none), seconds since the step began
    finished                       ended requests by finish reason
    error                          why the scheduler has stopped; "": it works
    prefill                        the prefill process; None: there is none
    """

    running: int = 0
    prefilling: int = 0
    waiting: int = 0
    kv_used: int = 0
    kv_cached: int = 0
    kv_total: int = 0
    snapshots: int = 0
    snapshots_total: int = 0
    tokens_generated: int = 0
    prompt_tokens: int = 0
    prefix_hits: int = 0
    prefix_tokens: int = 0
    preemptions: int = 0
    tokens_restored: int = 0
    steps: int = 0
    recent: tuple[StepTime, ...] = ()
    executor_seconds: float = 0.0
    step_seconds_total: float = 0.0
    batch: int = 0
    phase: str = ""
    step_age: float = 0.0
    finished: Mapping[str, int] = field(default_factory=dict)
    error: str = ""
    prefill: PrefillState | None = None

    @property
    def step_seconds(self) -> tuple[float, ...]:
        """Seconds of each recent step."""
        return tuple(step.seconds for step in self.recent)


class Meter:
    """Counts as the scheduler's thread works, in `counts`; `snapshot` may be called from any
    thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._recent: deque[StepTime] = deque(maxlen=_RECENT)
        self._began: float | None = None
        self._finished: Counter[str] = Counter()
        self._inside = 0.0
        self._decoded = self._prefilled = 0
        self._called = False
        self.counts = SchedulerStats()

    @property
    def step_age(self) -> float:
        """Seconds since the step under way began; 0 between steps."""
        began = self._began
        return 0.0 if began is None else max(0.0, time.perf_counter() - began)

    @contextmanager
    def step(self) -> Iterator[None]:
        """A step for the length of a `with`; counted if it called the executor."""
        self._called = False
        self._inside, self._decoded, self._prefilled = 0.0, 0, 0
        self._began = time.perf_counter()
        try:
            yield
        finally:
            seconds = time.perf_counter() - self._began
            self._began = None
            if self._called:
                with self._lock:
                    self.counts.steps += 1
                    self.counts.step_seconds_total += seconds
                    self.counts.executor_seconds += self._inside
                    self._recent.append(
                        StepTime(seconds, self._inside, self._decoded, self._prefilled)
                    )

    @contextmanager
    def call(self, phase: str) -> Iterator[None]:
        """A call of the executor for the length of a `with`."""
        self.counts.phase, self._called = phase, True
        began = time.perf_counter()
        try:
            yield
        finally:
            self._inside += time.perf_counter() - began
            self.counts.phase = ""

    def did(self, *, decoded: int = 0, prefilled: int = 0) -> None:
        """Count what a call has done."""
        self._decoded += decoded
        self.counts.batch = decoded or self.counts.batch
        self._prefilled += prefilled
        self.counts.prompt_tokens += prefilled

    def ended(self, reason: str) -> None:
        """Count an ended request."""
        with self._lock:
            self._finished[reason] += 1

    def snapshot(self, kv: KVCache, *, running: int, **others: Any) -> SchedulerStats:
        """The figures now, with those that the meter does not know."""
        with self._lock:
            return replace(
                self.counts,
                running=running,
                kv_used=kv.allocator.used,
                kv_cached=kv.allocator.cached,
                kv_total=kv.allocator.count,
                snapshots=len(kv.snapshots),
                snapshots_total=kv.layout.snapshots,
                recent=tuple(self._recent),
                batch=self.counts.batch if running else 0,
                step_age=self.step_age,
                finished=dict(self._finished),
                **others,
            )
