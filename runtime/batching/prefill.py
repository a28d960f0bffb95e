"""The prompts that somebody computes beside a scheduler's thread, a prefill process or the devices:
one at a time, first come first served; hides who may still write to which cache blocks.

    takes(job)     ->  waiting  ->  being computed  ->  an arrival out of `tend`
    drop(job)          gone at once  a ghost: its blocks are free when nobody writes to them

A process that dies is replaced. The prompt it was computing is given to the new one once more, from
the last token that is in the cache; if that one dies of it too, the prompt arrives as an error.
Nothing here waits for what computes but `finish`.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError, WorkerError
from hmc.runtime.batching.job import Job
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.phases.beside import DevicePrefill
from hmc.runtime.prefill.worker import PrefillState, PrefillWorker

_ATTEMPTS = 2  # what the message of a lost prompt says
_FINISH_SECONDS = 2.0
_FINISH_POLL = 0.005
_TEND_SECONDS, _TEND_IDLE_SECONDS = 0.005, 1.0

Arrival = tuple[Job, npt.NDArray[np.float32] | None, HmcError | None]
"""Whose prompt is in the cache, with f32 [vocab] logits of its last token; or what went wrong, and
nothing is written to its blocks any more."""


class PrefillsBeside:
    """For the scheduler's thread; `state` and `jobs` for any. `computer` is who computes them;
    without one there are none."""

    def __init__(
        self,
        computer: PrefillWorker | DevicePrefill | None,
        *,
        grown: Callable[[Sequence, npt.NDArray[np.int32]], None],
        release: Callable[[Sequence], None],
    ) -> None:
        """`grown` is told when more of a prompt is in the cache, `release` frees a dropped prompt's
        sequence.
        """
        self.computer = computer
        self._grown, self._release = grown, release
        self._waiting: deque[Job] = deque()
        self._current: Job | None = None
        """A ghost when its prompt was stopped."""

    @property
    def jobs(self) -> list[Job]:
        """Those whose prompts are on their way, first come first."""
        current = self._current
        dropped = current is None or (current.prompt is not None and current.prompt.stopped)
        return [*([] if current is None or dropped else [current]), *self._waiting]

    @property
    def empty(self) -> bool:
        """Whether nobody's blocks are written to and nobody waits for that."""
        return self._current is None and not self._waiting

    @property
    def exclusive(self) -> bool:
        """Whether no other prompt that streams may be computed now."""
        return self.computer is not None and self.computer.exclusive and not self.empty

    @property
    def stuck_for(self) -> float:
        """Seconds that a call on the devices, which nothing but its own end ends, has been
        running."""
        return 0.0 if self.computer is None else self.computer.stuck_for

    @property
    def patience(self) -> float | None:
        """Seconds until `tend` is due; None: there is nothing to be looked after."""
        if self.computer is None:
            return None
        return _TEND_IDLE_SECONDS if self.empty else _TEND_SECONDS

    @property
    def state(self) -> PrefillState | None:
        """The prefill process now, if there is one."""
        if not isinstance(self.computer, PrefillWorker):
            return None
        count, current = len(self.jobs), self._current
        if current is None or current.prompt is None or current.sequence is None:
            return self.computer.state(count, 0, 0)
        return self.computer.state(count, current.sequence.length, len(current.ids))

    def takes(self, job: Job) -> bool:
        """Whether the rest of an admitted job's prompt is computed beside: it is begun then."""
        left, every = len(job.ids) - job.cached, job.scored is not None
        if self.computer is None or not self.computer.takes(job.phase, left, every=every):
            return False
        self._waiting.append(job)
        self._submit()
        return True

    def drop(self, job: Job) -> None:
        """Forget a prompt; its sequence is released as soon as nothing is written to it."""
        if job is not self._current:
            self._waiting.remove(job)
        elif job.prompt is not None:
            job.prompt.stopped = True
            return
        else:
            self._current = None
        self._release(job.place)

    def tend(self) -> Arrival | None:
        """What has arrived since the last call; also looks after who computes."""
        if self.computer is None:
            return None
        arrival = self._settle(self.computer)
        self.computer.tend(wanted=not self.empty)
        self._submit()
        return arrival

    def finish(self) -> None:
        """Drop everything, and wait until nothing of it is written to. A process that does not let
        go within two seconds is ended; the devices' call is waited for.
        """
        for job in self.jobs:
            self.drop(job)
        limit = time.monotonic() + _FINISH_SECONDS
        while self._current is not None and self.computer is not None:
            # on devices their own deadlines end a call that hangs
            if time.monotonic() > limit and isinstance(self.computer, PrefillWorker):
                self.computer.close()
            self._settle(self.computer)
            time.sleep(_FINISH_POLL)

    def _submit(self) -> None:
        """Have the next prompt computed, if none is."""
        if self._current is None and self._waiting:
            self._current = self._waiting.popleft()
        job = self._current
        if job is not None and job.prompt is None and self.computer is not None:
            job.past = job.place.length
            job.prompt = self.computer.start(job.place, job.ids[job.past :])

    def _settle(self, computer: PrefillWorker | DevicePrefill) -> Arrival | None:
        """Take in how far the prompt under way has come."""
        computer.hear()
        job = self._current
        if job is None or job.prompt is None:
            return None
        prompt, sequence = job.prompt, job.place
        over, known = prompt.over, sequence.length
        sequence.length = job.past + prompt.tokens
        if sequence.length > known:
            self._grown(sequence, job.ids)
        if not over:
            return None
        error = prompt.error
        if prompt.lost and not prompt.stopped:
            job.attempts += 1
            job.prompt = None
            if job.attempts < _ATTEMPTS:
                return None
            reason = str(error).partition(":")[0]
            error = WorkerError(
                f"the prompt was lost twice, the second time because {reason}: send it again, or"
                " serve without a prefill process"
            )
        self._current = None
        if prompt.stopped:
            self._release(sequence)
            return None
        return job, prompt.logits, error
