"""The prompt that somebody computes beside a scheduler's thread, a prefill process or the devices:
one at a time; hides who may still write to which cache blocks.

    start(job)  ->  being computed  ->  an arrival out of `tend`
    drop()          a ghost: its blocks are free when nobody writes to them

A process that dies is replaced. The prompt it was computing is given to the new one once more, from
the last token that is in the cache, or where layers keep states a sequence, which are then of no
known position, from what others could share of it. If that one dies of it too, the prompt arrives
as an error.
Nothing here waits for what computes but `finish`.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError, WorkerError
from hmc.runtime.batching.job import Job
from hmc.runtime.batching.room import Room
from hmc.runtime.memory.kv import KVCache, Sequence
from hmc.runtime.phases.beside import DevicePrefill, PromptJob
from hmc.runtime.prefill.worker import PrefillState, PrefillWorker

_ATTEMPTS = 2  # what the message of a lost prompt says
_FINISH_SECONDS = 2.0
_FINISH_POLL = 0.005
_TEND_SECONDS, _TEND_IDLE_SECONDS = 0.005, 1.0

Arrival = tuple[Job, npt.NDArray[np.float32] | None, HmcError | None]
"""Whose prompt is in the cache, with f32 [vocab] logits of its last token; or what went wrong, and
nothing is written to its blocks any more."""


@dataclass
class _Prompt:
    """A request's prompt, of which `past` tokens were in the cache when `work` began; none is under
    way between two attempts. A ghost when its work was stopped.
    """

    job: Job
    sequence: Sequence
    past: int = 0
    work: PromptJob | None = None
    attempts: int = 0

    @property
    def stopped(self) -> bool:
        return self.work is not None and self.work.stopped


class PrefillsBeside:
    """For the scheduler's thread; `state` and `jobs` for any. `computer` is who computes them;
    without one there are none."""

    def __init__(
        self,
        computer: PrefillWorker | DevicePrefill | None,
        kv: KVCache,
        room: Room,
    ) -> None:
        """`kv` keeps what is computed of a prompt, `room` takes a dropped one's sequence back."""
        self.computer = computer
        self._kv, self._room = kv, room
        self._current: _Prompt | None = None

    @property
    def jobs(self) -> list[Job]:
        """The request whose prompt is on its way, if there is one."""
        current = self._current
        return [] if current is None or current.stopped else [current.job]

    @property
    def empty(self) -> bool:
        """Whether nobody's blocks are written to: another prompt can be started."""
        return self._current is None

    @property
    def leaving(self) -> bool:
        """Whether blocks become free as soon as nobody writes to them any more."""
        return self._current is not None and self._current.stopped

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
        current = self._current
        if current is None or current.stopped:
            return self.computer.state(0, 0, 0)
        return self.computer.state(1, current.sequence.length, len(current.job.ids))

    def takes(self, job: Job, phase: str) -> bool:
        """Whether the rest of the prompt of an admitted request is computed beside, which the
        policy gives to `phase`.
        """
        every = job.scored is not None
        return self.computer is not None and self.computer.takes(phase, job.left, every=every)

    def start(self, job: Job) -> None:
        """Have an admitted request's prompt computed; `empty` before."""
        self._current = _Prompt(job, job.place)
        self._submit()

    def drop(self) -> None:
        """Forget the prompt under way; its sequence is released as soon as nothing is written to
        it.
        """
        current = self._current
        if current is not None and current.work is not None:
            current.work.stopped = True
        elif current is not None:
            self._current = None
            self._room.release(current.sequence)

    def tend(self) -> Arrival | None:
        """What has arrived since the last call; also looks after who computes."""
        if self.computer is None:
            return None
        arrival = self._settle(self.computer)
        self.computer.tend(wanted=not self.empty)
        self._submit()
        return arrival

    def finish(self) -> None:
        """Drop the prompt, and wait until nothing of it is written to. A process that does not let
        go within two seconds is ended; the devices' call is waited for.
        """
        self.drop()
        limit = time.monotonic() + _FINISH_SECONDS
        while self._current is not None and self.computer is not None:
            # on devices their own deadlines end a call that hangs
            if time.monotonic() > limit and isinstance(self.computer, PrefillWorker):
                self.computer.close()
            self._settle(self.computer)
            time.sleep(_FINISH_POLL)

    def _submit(self) -> None:
        """Hand the prompt over, or what is left of it after the first attempt."""
        current = self._current
        if current is not None and current.work is None and self.computer is not None:
            if isinstance(self.computer, PrefillWorker):
                self._kv.lend(current.sequence)
            current.past = current.sequence.length
            ids = current.job.ids[current.past :]
            current.work = self.computer.start(current.sequence, ids)

    def _settle(self, computer: PrefillWorker | DevicePrefill) -> Arrival | None:
        """Take in how far the prompt under way has come."""
        computer.hear()
        current = self._current
        if current is None or current.work is None:
            return None
        job, work, sequence = current.job, current.work, current.sequence
        over, known = work.over, sequence.length
        sequence.length = current.past + work.tokens
        if sequence.length > known:
            self._kv.keep(sequence, job.ids)
        if not over:
            return None
        error = work.error
        if work.lost and not work.stopped:
            current.attempts += 1
            current.work = None
            if current.attempts < _ATTEMPTS:
                if self._kv.layout.bytes_per_sequence:
                    self._room.begin(job)
                    current.sequence = job.place
                return None
            reason = str(error).partition(":")[0]
            error = WorkerError(
                f"the prompt was lost twice, the second time because {reason}: send it again, or"
                " serve without a prefill process"
            )
        self._current = None
        self._kv.settle(sequence)
        if work.stopped:
            self._room.release(sequence)
            return None
        return job, work.logits, error
