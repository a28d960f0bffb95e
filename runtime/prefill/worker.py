"""A process that prefills prompts beside decoding, over the same weights and the same KV cache;
hides that it dies, hangs and is replaced.

    cache = SharedBlock(cache_bytes(plan.kv), "KV cache")
    kv = KVCache(plan.kv, plan.limits.max_context, cache)
    executor = Executor(plan, directory, home="shared", kv=kv, cpus=decode_cpus)
    with PrefillWorker(plan, directory, executor.store, cache, cpus=prefill_cpus) as worker:
        executor.kv.reserve(sequence, len(ids))
        job = worker.start(sequence, ids)
        ...                                    # decode others; worker.hear() now and then
        sequence.length += len(ids)            # once job.logits are there: the cache holds them

Blocks stay the parent's: it keeps those of a prompt reserved until its job is over. So do slots of
states, which the process changes in place; one that is lost half way leaves them of no known
position.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from hmc.closing import Closing
from hmc.errors import HmcError, WorkerError
from hmc.plan import Plan
from hmc.plan.phases import in_own_process
from hmc.runtime.children import Child
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.memory.shared import SharedBlock
from hmc.runtime.phases.beside import PromptJob, cancelled
from hmc.runtime.prefill.messages import Cancel, Ready, Report, Setup, Start
from hmc.runtime.weights.store import Shared, WeightStore

_COMMAND = (sys.executable, "-m", "hmc.runtime.prefill.child")
_POLL_SECONDS = 0.05


@dataclass(frozen=True)
class PrefillState:
    """The prefill process at one moment.

    pid, alive, ready   its number; whether it runs; whether it has loaded
    restarts            how often it was replaced
    prompts             prompts it has, the one under way and those behind it
    tokens, total       of the prompt it was given, in the cache and altogether; 0 of 0: there is
                        none
    silent_seconds      how long it has not been heard of with a prompt under way
    """

    pid: int
    alive: bool
    ready: bool
    restarts: int
    prompts: int
    tokens: int
    total: int
    silent_seconds: float


class PrefillWorker(Closing):
    """The parent's side: computes one prompt at a time, for one thread; `state` is for any. A
    context manager. `trouble` is why the process is gone, None while it lives; `ready`: it has
    loaded; `restarts`: how often it was replaced."""

    exclusive = False
    """Whether no other prompt that streams may be computed meanwhile, by whomever."""
    stuck_for = 0.0
    """Seconds that something has been running which cannot be ended alone."""

    def __init__(
        self,
        plan: Plan,
        directory: Path | None,
        store: WeightStore,
        cache: SharedBlock,
        *,
        cpus: Iterable[int],
        silence: float = 300.0,
    ) -> None:
        """Start a process on `cpus` that shares `store` (shared, or mapped shards of `directory`)
        and the cache in `cache`. It takes a while to be ready; a prompt may be started before. One
        that is not heard of for `silence` seconds while it has a prompt is killed.

        `UsageError` when the weights are neither: private dummies cannot be shared.
        """
        self._setup = Setup(Shared.of(plan, store, directory), cache.descriptor, tuple(cpus))
        self.silence = silence
        self._plan = plan
        self.restarts = 0
        self._job: PromptJob | None = None
        self._start: Start | None = None
        self._launch()

    def takes(self, phase: str, tokens: int, *, every: bool) -> bool:
        """Whether it computes a prompt that the policy gives to a phase, of which `tokens` are
        left, the logits of `every` one wanted or of the last."""
        return in_own_process(self._plan, phase, tokens, every=every)

    def start(self, sequence: Sequence, ids: npt.NDArray[np.int32]) -> PromptJob | None:
        """Compute `ids` i32 [tokens] after what a sequence holds, with room for all of them, once
        the prompt before is over; None: the process is gone, ask again after `tend`."""
        if self.trouble is not None:
            return None
        self._job = job = PromptJob()
        self._start = Start(
            sequence.row,
            tuple(sequence.blocks),
            sequence.length,
            np.array(ids, np.int32),
            tuple((sequence.lent or {}).items()),
        )
        self._told = False
        if self.ready:
            self._send(self._start)
        return job

    def hear(self, timeout: float = 0.0) -> None:
        """Take in what the process has said, waiting up to `timeout` seconds for a first word; have
        a prompt that was stopped cancelled."""
        job = self._job
        if job is not None and job.stopped and not self._told and not job.over:
            self._told = True
            if self.ready:
                self._send(Cancel())
            else:
                job.end(None, cancelled())
        try:
            while self.trouble is None and (report := self._process.hear(timeout)):
                self._take(report)
                timeout = 0.0
        except WorkerError as error:
            self._lose(error)

    def tend(self, wanted: bool) -> None:
        """End a hung process and replace a dead one; `wanted`: there are prompts for it."""
        self.hear()
        if self._job is not None and self._job.silent_seconds > self.silence:
            self._process.kill()
            self.hear(_POLL_SECONDS)
        # One that never came up is tried again for a prompt's sake only.
        if self.trouble is not None and (self._was_ready or wanted):
            self.restart()
            self.restarts += 1

    def wait_ready(self, timeout: float | None = None) -> bool:
        """Wait until it takes prompts; False after `timeout` seconds. Raises why it cannot
        begin."""
        limit = None if timeout is None else time.monotonic() + timeout
        while True:
            self.hear(_POLL_SECONDS)
            if self.trouble is not None:
                raise self.trouble
            if self.ready or (limit is not None and time.monotonic() >= limit):
                return self.ready

    @property
    def pid(self) -> int:
        """The process's number."""
        return self._process.pid

    def state(self, prompts: int, tokens: int, total: int) -> PrefillState:
        """The figures now, with those of its prompts."""
        alive, job = self.trouble is None, self._job
        silent = 0.0 if job is None else job.silent_seconds
        ready = alive and self.ready
        return PrefillState(self.pid, alive, ready, self.restarts, prompts, tokens, total, silent)

    def restart(self) -> None:
        """A fresh process; a prompt that was not over is lost."""
        self._lose(WorkerError("the prefill process was restarted: start the job again"))
        self._launch()

    def close(self) -> None:
        """End the process, within seconds whatever it does; a second call does nothing."""
        self._lose(WorkerError("the prefill process is closed"))

    def _launch(self) -> None:
        self._process = Child(
            _COMMAND,
            self._setup,
            [self._setup.cache, *self._setup.weights.descriptors],
            name="the prefill worker",
            remedy="restart it and start its jobs again",
        )
        self.trouble: HmcError | None = None
        self.ready = self._was_ready = False

    def _send(self, command: Start | Cancel) -> None:
        try:
            self._process.send(command)
        except WorkerError as error:
            self._lose(error)

    def _take(self, report: Ready | Report) -> None:
        job = self._job
        if isinstance(report, Report):
            assert job is not None
            job.advanced(report.tokens)
            if report.logits is not None or report.error is not None:
                job.end(report.logits, report.error)
        elif report.error is not None:
            self._lose(report.error)
        else:
            self.ready = self._was_ready = True
            if job is not None and self._start is not None and not job.over:
                job.advanced(0)
                self._send(self._start)

    def _lose(self, trouble: HmcError) -> None:
        """Make sure that the process is no more; its prompt fails with `trouble`."""
        self._process.end()
        self.trouble, self.ready = self.trouble or trouble, False
        if self._job is not None and not self._job.over:
            self._job.lost = True
            self._job.end(None, trouble)
