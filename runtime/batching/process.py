"""The prefill process as a scheduler sees it: who computes prompts beside it. Hides that it dies,
hangs and is replaced.
"""

from __future__ import annotations

import os
import signal
from contextlib import suppress
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.errors import HmcError, WorkerError
from hmc.plan import Plan
from hmc.plan.phases import in_own_process
from hmc.runtime.memory.kv import Sequence
from hmc.runtime.prefill.worker import Job, PrefillWorker


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


class PrefillKeeper:
    """Looks after a process."""

    exclusive = False
    """Whether no other prompt that streams may be computed meanwhile, by whomever."""
    stuck_for = 0.0
    """Seconds that something has been running which cannot be ended alone."""

    def __init__(self, worker: PrefillWorker, plan: Plan, silence: float) -> None:
        """A process that is not heard of for `silence` seconds while it has a prompt is killed and
        replaced."""
        self.silence = silence
        self._worker, self._plan = worker, plan
        self._restarts = 0
        self._was_ready = False
        self._trouble: HmcError | None = None  # of the process before

    def takes(self, phase: str, tokens: int, *, every: bool) -> bool:
        """Whether it computes a prompt that the policy gives to a phase, of which `tokens` are
        left, the logits of `every` one wanted or of the last."""
        return in_own_process(self._plan, phase, tokens, every=every)

    def start(self, sequence: Sequence, ids: npt.NDArray[np.int32]) -> Job | None:
        """Compute `ids` i32 [tokens] after what a sequence holds; None: it is gone, ask again after
        `tend`."""
        if self._worker.trouble is not None:
            return None
        try:
            return self._worker.start(sequence.blocks, sequence.length, ids)
        except WorkerError:  # it died just now: the next `tend` finds out
            return None

    def lost(self, error: HmcError) -> bool:
        """Whether a job with this error may be started once more."""
        return error in (self._worker.trouble, self._trouble)

    def tend(self, wanted: bool) -> None:
        """End a hung process and replace a dead one; `wanted`: there are prompts for it."""
        if self._worker.silent_seconds > self.silence:
            with suppress(ProcessLookupError):
                os.kill(self._worker.pid, signal.SIGKILL)
        # One that never came up is tried again for a prompt's sake only.
        trouble = self._worker.trouble
        if trouble is not None and (self._was_ready or wanted):
            self._trouble = trouble
            self._worker.restart()
            self._restarts += 1
            self._was_ready = False
        self._was_ready = self._was_ready or self._worker.ready

    def end(self) -> None:
        """End it, if it can be ended while it computes."""
        self._worker.close()

    def state(self, prompts: int, tokens: int, total: int) -> PrefillState:
        """The figures now, with those of its prompts."""
        alive = self._worker.trouble is None
        return PrefillState(
            pid=self._worker.pid,
            alive=alive,
            ready=alive and self._worker.ready,
            restarts=self._restarts,
            prompts=prompts,
            tokens=tokens,
            total=total,
            silent_seconds=self._worker.silent_seconds,
        )
