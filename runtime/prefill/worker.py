"""A process that prefills prompts beside decoding, over the same weights and the same KV cache;
hides its queue of jobs and what it says of them.

    cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
    kv = KVCache(plan.kv, plan.limits.max_context, cache)
    executor = Executor(plan, directory, home="shared", kv=kv, cpus=decode_cpus)
    with PrefillWorker(plan, directory, executor.store, cache, cpus=prefill_cpus) as worker:
        executor.kv.reserve(sequence, len(ids))
        job = worker.start(sequence.blocks, sequence.length, ids)
        ...                                    # decode others; job.poll() now and then
        sequence.length += len(ids)            # once poll gave the logits: the cache holds them

Blocks stay the parent's: it keeps those of a job reserved until the job is over.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hmc.closing import Closing
from hmc.errors import (
    ContextLengthError,
    ExecutionError,
    HmcError,
    UnsupportedError,
    UsageError,
    WorkerError,
)
from hmc.plan import Plan
from hmc.plan.file import canonical_json
from hmc.runtime.children import Child
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.prefill.messages import Cancel, Ready, Report, Setup, Start, cancelled
from hmc.runtime.weights.store import WeightStore

_COMMAND = (sys.executable, "-m", "hmc.runtime.prefill.child")
_POLL_SECONDS = 0.05


class Job:
    """One prompt on its way. `tokens` of it are in the cache."""

    def __init__(self, worker: PrefillWorker, start: Start) -> None:
        self.tokens = 0
        self._worker, self._start = worker, start
        self._logits: npt.NDArray[np.float32] | None = None
        self._error: HmcError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is written to its blocks any more; brought up to date by `poll`."""
        return self._logits is not None or self._error is not None

    def poll(self) -> npt.NDArray[np.float32] | None:
        """Without waiting: f32 [vocab] logits of the last token, None while it is not done.

        Raises why it ended early: `WorkerError` when the process is gone (`restart` it and start
        the job again), `ExecutionError` when it was cancelled, or what broke in it.
        """
        if not self.over:
            self._worker._listen(0.0)
        if self._error is not None:
            raise self._error
        return self._logits

    def stop(self) -> None:
        """Have it cancelled, without waiting for that; it is `over` when `poll` has said so."""
        self._worker._cancel(self)


class PrefillWorker(Closing):
    """The parent's side. A context manager; methods may be called from any thread."""

    def __init__(
        self,
        plan: Plan,
        directory: Path | None,
        store: WeightStore,
        cache: SharedBlock,
        *,
        cpus: Iterable[int],
    ) -> None:
        """Start a process on `cpus` that shares `store` (shared, or mapped shards of `directory`)
        and the cache in `cache`. It takes a while to be ready; jobs may be started before.

        `UsageError` when the weights are neither: private dummies cannot be shared;
        `UnsupportedError` for models that keep states a sequence.
        """
        if store.arena is None and store.home != "mapped":
            raise UsageError(
                f"{store.home} weights in private memory cannot be shared with a prefill process:"
                ' open them with home="shared"'
            )
        if plan.kv.bytes_per_sequence:
            raise UnsupportedError(
                "a prefill process for a model that keeps states a sequence: prompts that it loses"
                " half way could not go on; run without one"
            )
        self._plan, self._cache, self._store = plan, cache, store
        self._directory = None if directory is None else str(directory.absolute())
        self._cpus = tuple(cpus)
        self._blocks = -(-plan.kv.capacity_tokens // plan.kv.block)
        self._plan_json = canonical_json(plan)
        self._lock = threading.RLock()
        self._jobs: dict[int, Job] = {}
        self._number = 0
        self._launch()

    def start(self, blocks: Iterable[int], past: int, ids: npt.NDArray[np.int32]) -> Job:
        """Prefill i32 `ids` into the cache after `past` tokens of a sequence whose cache blocks are
        `blocks`, in order, enough for all. Jobs are done one after the other.

        Raises `WorkerError` when the process is gone, `UsageError` or `ContextLengthError` for what
        it cannot do.
        """
        own = tuple(int(block) for block in blocks)
        self._check(own, past, ids)
        with self._lock:
            self._listen(0.0)
            if self._trouble is not None:
                raise self._trouble
            self._number += 1
            start = Start(self._number, own, past, np.array(ids, np.int32))
            if not self._jobs:
                self._heard = time.monotonic()  # nothing was to be heard
            job = self._jobs[start.job] = Job(self, start)
            if self.ready:
                self._send(start)
            return job

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until it takes jobs; False after `timeout` seconds. Raises why it cannot begin."""
        limit = None if timeout is None else time.monotonic() + timeout
        while True:
            self._listen(_POLL_SECONDS)
            if self._trouble is not None:
                raise self._trouble
            if self.ready or (limit is not None and time.monotonic() >= limit):
                return self.ready

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    @property
    def trouble(self) -> HmcError | None:
        """Why the process is gone; None while it lives."""
        with self._lock:
            self._listen(0.0)
            return self._trouble

    @property
    def silent_seconds(self) -> float:
        """How long a process with jobs to do has not been heard of; 0 without jobs."""
        with self._lock:
            self._listen(0.0)
            return time.monotonic() - self._heard if self._jobs else 0.0

    def restart(self) -> None:
        """A fresh process; jobs that were not over fail with `WorkerError`."""
        with self._lock:
            self._lose(WorkerError("the prefill process was restarted: start the job again"))
            self._launch()

    def close(self) -> None:
        """End the process, within seconds whatever it does; a second call does nothing."""
        with self._lock:
            self._lose(WorkerError("the prefill process is closed"))

    # -- what the process says ---------------------------------------------------------------------

    def _launch(self) -> None:
        arena = self._store.arena
        setup = Setup(
            self._plan_json,
            self._directory,
            None if arena is None else arena.descriptor,
            self._cache.descriptor,
            self._cpus,
        )
        self._process = Child(
            _COMMAND,
            setup,
            [setup.cache, *([] if setup.weights is None else [setup.weights])],
            name="the prefill worker",
            remedy="restart it and start its jobs again",
        )
        self._trouble: HmcError | None = None
        self.ready = False
        self._heard = time.monotonic()

    def _send(self, command: Start | Cancel) -> None:
        try:
            self._process.send(command)
        except WorkerError as error:
            self._lose(error)

    def _listen(self, timeout: float) -> None:
        """Take in what the process has said, waiting up to `timeout` seconds for a first word."""
        with self._lock:
            try:
                while self._trouble is None and (report := self._process.hear(timeout)):
                    self._heard = time.monotonic()
                    self._take(report)
                    timeout = 0.0
            except WorkerError as error:
                self._lose(error)

    def _take(self, report: Ready | Report) -> None:
        if isinstance(report, Report):
            job = self._jobs[report.job]
            job.tokens, job._logits, job._error = report.tokens, report.logits, report.error
            if job.over:
                del self._jobs[report.job]
        elif report.error is not None:
            self._lose(report.error)
        else:
            self.ready = True
            for job in list(self._jobs.values()):
                self._send(job._start)

    def _cancel(self, job: Job) -> None:
        with self._lock:
            self._listen(0.0)
            if job.over:
                return
            if not self.ready:
                del self._jobs[job._start.job]
                job._error = cancelled()
                return
            self._send(Cancel(job._start.job))

    def _lose(self, trouble: HmcError) -> None:
        """Make sure that the process is no more; its jobs fail with `trouble`."""
        self._process.end()
        if self._trouble is None:
            self._trouble = trouble
        self.ready = False
        for job in self._jobs.values():
            job._error = trouble
        self._jobs.clear()

    def _check(self, blocks: tuple[int, ...], past: int, ids: npt.NDArray[np.int32]) -> None:
        total, limit = past + len(ids), self._plan.limits.max_context
        if total > limit:
            raise ContextLengthError(
                f"{total} tokens exceed the plan's context of {limit}: shorten the prompt or"
                " compile with a larger --max-context"
            )
        if not len(ids) or past < 0:
            raise UsageError(f"a prefill of {len(ids)} tokens after {past}: give at least one")
        if ids.min() < 0 or ids.max() >= self._plan.model.vocab:
            raise UsageError(f"token ids must lie in 0..{self._plan.model.vocab - 1}")
        block = self._plan.kv.block
        most = -(-limit // block)
        needed = -(-total // block)
        if not needed <= len(blocks) <= most or not all(0 <= i < self._blocks for i in blocks):
            raise ExecutionError(
                f"{total} tokens in {len(blocks)} cache blocks of {block}: {needed} to {most} are"
                f" wanted, out of 0..{self._blocks - 1}"
            )
