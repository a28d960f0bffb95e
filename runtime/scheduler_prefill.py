"""The prompts that a prefill process computes for a scheduler: one at a time, first come first
served; hides the process's death and who may still write to which cache blocks.

    start(owner, ..)  ->  waiting  ->  with the process  ->  an `Arrival` out of `tend`
    drop(owner)           gone at once  a ghost: its blocks are free when the process has let go

A process that dies is replaced. The prompt it was computing is given to the new one once more, from
the last token that is in the cache; if that one dies of it too, the prompt arrives as an error.
Nothing here waits for the process but `finish`.
"""

from __future__ import annotations

import os
import signal
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError, WorkerError
from hmc.runtime.kv import Sequence
from hmc.runtime.prefill_worker import Job, PrefillWorker

_ATTEMPTS = 2  # what the message of a lost prompt says
_FINISH_SECONDS = 2.0
_FINISH_POLL = 0.005

Owner = TypeVar("Owner")


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


@dataclass(frozen=True)
class Arrival(Generic[Owner]):
    """A prompt that is in the cache, with f32 [vocab] logits of its last token; or what went
    wrong, and nothing is written to its blocks any more.
    """

    owner: Owner
    logits: npt.NDArray[np.float32] | None
    error: HmcError | None = None


@dataclass(eq=False)
class _Prompt(Generic[Owner]):
    owner: Owner
    sequence: Sequence
    ids: npt.NDArray[np.int32]
    past: int = 0  # tokens in the cache when the job began
    job: Job | None = None
    attempts: int = 0
    dropped: bool = False


class PrefillsBeside(Generic[Owner]):
    """For the scheduler's thread; `state` and `owners` for any."""

    def __init__(
        self,
        worker: PrefillWorker,
        *,
        grown: Callable[[Sequence, npt.NDArray[np.int32]], None],
        release: Callable[[Sequence], None],
        silence: float,
    ) -> None:
        """`grown` is told when more of a prompt is in the cache, `release` frees a dropped prompt's
        sequence. A process that is not heard of for `silence` seconds while it has a prompt is
        killed and replaced.
        """
        self._worker, self._silence = worker, silence
        self._grown, self._release = grown, release
        self._waiting: deque[_Prompt[Owner]] = deque()
        self._current: _Prompt[Owner] | None = None
        self._restarts = 0
        self._was_ready = False

    @property
    def owners(self) -> list[Owner]:
        """Those whose prompts are on their way, first come first."""
        current = self._current
        found = [current] if current is not None and not current.dropped else []
        return [prompt.owner for prompt in (*found, *self._waiting)]

    @property
    def empty(self) -> bool:
        """Whether the process writes to nobody's blocks and nobody waits for it."""
        return self._current is None and not self._waiting

    def start(self, owner: Owner, sequence: Sequence, ids: npt.NDArray[np.int32]) -> None:
        """Compute what `sequence`, with room for all of `ids` i32 [tokens], does not hold of it
        yet.
        """
        self._waiting.append(_Prompt(owner, sequence, ids))
        self._submit()

    def drop(self, owner: Owner) -> None:
        """Forget a prompt; its sequence is released as soon as nothing is written to it."""
        current = self._current
        if current is not None and current.owner is owner:
            current.dropped = True
            if current.job is not None:
                current.job.stop()
            return
        found = next(prompt for prompt in self._waiting if prompt.owner is owner)
        self._waiting.remove(found)
        self._release(found.sequence)

    def tend(self) -> list[Arrival[Owner]]:
        """What has arrived since the last call; also replaces a dead process, and ends a hung
        one.
        """
        arrivals = []
        if self._current is not None:
            if self._worker.silent_seconds > self._silence:
                with suppress(ProcessLookupError):
                    os.kill(self._worker.pid, signal.SIGKILL)
            arrivals = self._settle(self._current)
        # One that never came up is tried again for a prompt's sake only.
        if self._worker.trouble is not None and (self._was_ready or not self.empty):
            self._worker.restart()
            self._restarts += 1
            self._was_ready = False
        self._was_ready = self._was_ready or self._worker.ready
        self._submit()
        return arrivals

    def finish(self) -> None:
        """Drop everything, and wait for the process to let go of it for two seconds at most: then
        the process is ended.
        """
        for owner in self.owners:
            self.drop(owner)
        limit = time.monotonic() + _FINISH_SECONDS
        while self._current is not None:
            if time.monotonic() > limit:
                self._worker.close()
            self._settle(self._current)
            time.sleep(_FINISH_POLL)

    def state(self) -> PrefillState:
        """The figures now."""
        current = self._current
        given = current if current is not None and current.job is not None else None
        alive = self._worker.trouble is None
        return PrefillState(
            pid=self._worker.pid,
            alive=alive,
            ready=alive and self._worker.ready,
            restarts=self._restarts,
            prompts=len(self.owners),
            tokens=0 if given is None else given.sequence.length,
            total=0 if given is None else len(given.ids),
            silent_seconds=self._worker.silent_seconds,
        )

    def _submit(self) -> None:
        """Give the process the next prompt, if it has none."""
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
        prompt = self._current
        if prompt is None or prompt.job is not None or self._worker.trouble is not None:
            return
        sequence = prompt.sequence
        prompt.past = sequence.length
        rest = prompt.ids[prompt.past :]
        with suppress(WorkerError):  # it died just now: the next `tend` finds out
            prompt.job = self._worker.start(sequence.blocks, prompt.past, rest)

    def _settle(self, prompt: _Prompt[Owner]) -> list[Arrival[Owner]]:
        """Take in how far the prompt under way has come."""
        logits, error = None, None
        if prompt.job is not None:
            try:
                logits = prompt.job.poll()
            except HmcError as fault:
                error = fault
            known = prompt.sequence.length
            prompt.sequence.length = prompt.past + prompt.job.tokens
            if prompt.sequence.length > known:
                self._grown(prompt.sequence, prompt.ids)
            if logits is None and error is None:
                return []
        elif not prompt.dropped:
            return []
        if prompt.dropped:
            self._current = None
            self._release(prompt.sequence)
            return []
        if error is not None and error is self._worker.trouble:
            prompt.attempts += 1
            prompt.job = None
            if prompt.attempts < _ATTEMPTS:
                return []
            reason = str(error).partition(":")[0]
            error = WorkerError(
                f"the prompt was lost twice, the second time because {reason}: send it again, or"
                " serve without a prefill process"
            )
        self._current = None
        return [Arrival(prompt.owner, logits, error)]
