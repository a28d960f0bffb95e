"""The prompts that somebody computes beside a scheduler's thread, a prefill process or the devices:
one at a time, first come first served; hides who may still write to which cache blocks.

    start(owner, ..)  ->  waiting  ->  being computed  ->  an arrival out of `tend`
    drop(owner)           gone at once  a ghost: its blocks are free when nobody writes to them

A process that dies is replaced. The prompt it was computing is given to the new one once more, from
the last token that is in the cache; if that one dies of it too, the prompt arrives as an error.
Nothing here waits for what computes but `finish`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError, WorkerError
from hmc.runtime.batching.job import Job
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.phases.beside import DevicePrefill, PromptJob
from hmc.runtime.prefill.worker import PrefillWorker

_ATTEMPTS = 2  # what the message of a lost prompt says
_FINISH_SECONDS = 2.0
_FINISH_POLL = 0.005

Arrival = tuple[Job, npt.NDArray[np.float32] | None, HmcError | None]
"""Whose prompt is in the cache, with f32 [vocab] logits of its last token; or what went wrong, and
nothing is written to its blocks any more."""


@dataclass(eq=False)
class _Prompt:
    owner: Job
    sequence: Sequence
    past: int = 0  # tokens in the cache when the job began
    job: PromptJob | None = None
    attempts: int = 0
    dropped: bool = False


class PrefillsBeside:
    """For the scheduler's thread; `progress` and `owners` for any."""

    def __init__(
        self,
        computer: PrefillWorker | DevicePrefill,
        *,
        grown: Callable[[Sequence, npt.NDArray[np.int32]], None],
        release: Callable[[Sequence], None],
    ) -> None:
        """`grown` is told when more of a prompt is in the cache, `release` frees a dropped prompt's
        sequence.
        """
        self.computer = computer
        self._grown, self._release = grown, release
        self._waiting: deque[_Prompt] = deque()
        self._current: _Prompt | None = None

    @property
    def owners(self) -> list[Job]:
        """Those whose prompts are on their way, first come first."""
        current = self._current
        found = [current] if current is not None and not current.dropped else []
        return [prompt.owner for prompt in (*found, *self._waiting)]

    @property
    def empty(self) -> bool:
        """Whether nobody's blocks are written to and nobody waits for that."""
        return self._current is None and not self._waiting

    @property
    def exclusive(self) -> bool:
        """Whether no other prompt that streams may be computed now."""
        return self.computer.exclusive and not self.empty

    @property
    def progress(self) -> tuple[int, int, int]:
        """How many prompts there are; of the one being computed, the tokens in the cache and
        altogether (0 of 0: there is none)."""
        current = self._current
        if current is None or current.job is None:
            return len(self.owners), 0, 0
        return len(self.owners), current.sequence.length, len(current.owner.ids)

    def start(self, owner: Job, sequence: Sequence) -> None:
        """Compute what `sequence`, with room for all of the owner's ids, does not hold of them
        yet.
        """
        self._waiting.append(_Prompt(owner, sequence))
        self._submit()

    def drop(self, owner: Job) -> None:
        """Forget a prompt; its sequence is released as soon as nothing is written to it."""
        current = self._current
        if current is not None and current.owner is owner:
            current.dropped = True
            if current.job is not None:
                current.job.stopped = True
            return
        found = next(prompt for prompt in self._waiting if prompt.owner is owner)
        self._waiting.remove(found)
        self._release(found.sequence)

    def tend(self) -> Arrival | None:
        """What has arrived since the last call; also looks after who computes."""
        arrival = self._settle()
        self.computer.tend(wanted=not self.empty)
        self._submit()
        return arrival

    def finish(self) -> None:
        """Drop everything, and wait until nothing of it is written to. A process that does not let
        go within two seconds is ended; the devices' call is waited for.
        """
        for owner in self.owners:
            self.drop(owner)
        limit = time.monotonic() + _FINISH_SECONDS
        while self._current is not None:  # on devices their own deadlines end a call that hangs
            if time.monotonic() > limit and isinstance(self.computer, PrefillWorker):
                self.computer.close()
            self._settle()
            time.sleep(_FINISH_POLL)

    def _submit(self) -> None:
        """Have the next prompt computed, if none is."""
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
        prompt = self._current
        if prompt is None or prompt.job is not None:
            return
        prompt.past = prompt.sequence.length
        prompt.job = self.computer.start(prompt.sequence, prompt.owner.ids[prompt.past :])

    def _settle(self) -> Arrival | None:
        """Take in how far the prompt under way has come."""
        prompt = self._current
        if prompt is None:
            return None
        self.computer.hear()
        job = prompt.job
        if job is not None:
            over, known = job.over, prompt.sequence.length
            prompt.sequence.length = prompt.past + job.tokens
            if prompt.sequence.length > known:
                self._grown(prompt.sequence, prompt.owner.ids)
            if not over:
                return None
        if prompt.dropped:
            self._current = None
            self._release(prompt.sequence)
        if prompt.dropped or job is None:
            return None
        error = job.error
        if job.lost:
            prompt.attempts += 1
            prompt.job = None
            if prompt.attempts < _ATTEMPTS:
                return None
            reason = str(error).partition(":")[0]
            error = WorkerError(
                f"the prompt was lost twice, the second time because {reason}: send it again, or"
                " serve without a prefill process"
            )
        self._current = None
        return prompt.owner, job.logits, error
