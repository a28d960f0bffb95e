"""Prompts computed on the devices beside decode calls, by a phase whose streams and memory are no
decode phase's; hides the thread that hands a prompt's calls over and waits for them.

    job = executor.beside.start(sequence, ids)     # room for all of `ids` is reserved
    ...                                            # decode others; look at job.over now and then
    sequence.length += len(ids)                    # once job.logits are there: the cache holds them

The sequence stays the caller's, who keeps it until the job is over. A call cannot be stopped half
way: a job that is stopped ends with the call under way. One prompt at a time, and none meanwhile
by another phase that streams: they share memory.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError, HmcError
from hmc.plan.phases import BESIDE
from hmc.runtime.memory.kv import Sequence

_CLOSE_SECONDS = 2.0

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]


class PromptJob:
    """One prompt that somebody computes beside: a thread here, or a process (runtime/prefill/).

    `tokens` of it are in the cache. Once it is `over` nothing is written to its blocks any more:
    there are f32 [vocab] `logits` of its last token, or the `error` that ended it early, `lost`
    where it may be started once more.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self.stopped = False
        """Set to have it end early, without waiting for that."""
        self.lost = False
        self.over = False
        self.logits: Floats | None = None
        self.error: HmcError | None = None
        self._heard = time.monotonic()

    @property
    def silent_seconds(self) -> float:
        """How long nothing has been heard of it; 0 when it is over."""
        return 0.0 if self.over else time.monotonic() - self._heard

    def advanced(self, tokens: int) -> None:
        """So many tokens are in the cache now."""
        self.tokens = tokens
        self._heard = time.monotonic()

    def end(self, logits: Floats | None, error: HmcError | None = None) -> None:
        """It is over."""
        self.logits, self.error = logits, error
        self.over = True


def cancelled() -> HmcError:
    """The error of a prompt that was stopped."""
    return ExecutionError("the prefill was cancelled")


class DevicePrefill:
    """Computes prompts by one phase of an executor, for the thread that owns it; has the methods of
    `prefill.worker.PrefillWorker`."""

    exclusive = True

    def __init__(
        self,
        run: Callable[[Ints, int, int, Ints], Floats],
        chunk: Callable[[int], int],
        give_up: Callable[[], None],
    ) -> None:
        """`run` makes a call of the phase: ids, row and length of their sequence, and the rows
        wanted; `chunk(left)` is how many of the tokens left it takes; `give_up` ends a call that
        hangs, and everything else on its devices.
        """
        self._call, self._chunk, self._give_up = run, chunk, give_up
        self._job: PromptJob | None = None
        self._thread: threading.Thread | None = None

    @property
    def busy(self) -> bool:
        """Whether a prompt is under way."""
        return self._job is not None and not self._job.over

    @property
    def stuck_for(self) -> float:
        """Seconds that the call under way has taken so far."""
        return 0.0 if self._job is None else self._job.silent_seconds

    def takes(self, phase: str, tokens: int, *, every: bool) -> bool:
        """Whether a prompt that the policy gives to `phase` is computed here."""
        return phase == BESIDE

    def start(self, sequence: Sequence, ids: Ints) -> PromptJob:
        """Compute `ids` i32 [tokens] after what a sequence holds, with room for all of them;
        `ExecutionError` while another prompt is under way."""
        if self.busy:
            raise ExecutionError("a prompt is under way on the devices: they take one at a time")
        self._job = job = PromptJob()
        arguments = (job, sequence.row, sequence.length, np.array(ids, np.int32))
        self._thread = threading.Thread(
            target=self._run, args=arguments, name="hmc-prompt-beside", daemon=True
        )
        self._thread.start()
        return job

    def hear(self) -> None:
        """Nothing: jobs know how far they are."""

    def tend(self, wanted: bool) -> None:
        """Nothing needs it."""

    def close(self) -> None:
        """End what is under way: when its call is over, in seconds otherwise."""
        if self._job is None or self._thread is None:
            return
        self._job.stopped = True
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up()
            self._thread.join(_CLOSE_SECONDS)

    def _run(self, job: PromptJob, row: int, past: int, ids: Ints) -> None:
        """The thread: call after call."""
        try:
            while not job.stopped:
                first = job.tokens
                count = self._chunk(len(ids) - first)
                last = first + count == len(ids)
                rows = np.arange(count - 1 if last else count, count, dtype=np.int32)
                logits = self._call(ids[first : first + count], row, past + first, rows)
                job.advanced(first + count)
                if last:
                    job.end(logits[-1].copy())
                    return
            job.end(None, cancelled())
        except HmcError as error:
            job.end(None, error)
        except Exception as fault:  # whatever it is, nobody may wait for ever
            wrapped = ExecutionError(f"a prompt beside failed: {type(fault).__name__}: {fault}")
            wrapped.__cause__ = fault
            job.end(None, wrapped)
