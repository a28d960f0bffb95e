"""Prompts computed on the devices beside decode calls, by a phase whose streams and memory are no
decode phase's; hides the thread that hands a prompt's calls over and waits for them.

    job = executor.beside.start(sequence, ids)     # room for all of `ids` is reserved
    ...                                            # decode others; job.poll() now and then
    sequence.length += len(ids)                    # once poll gave the logits: the cache holds them

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


class DeviceJob:
    """One prompt on its way. `tokens` of it are in the cache."""

    def __init__(self) -> None:
        self.tokens = 0
        self.stopped = False
        self._heard = time.monotonic()
        self._ended = threading.Event()
        self._logits: Floats | None = None
        self._error: HmcError | None = None

    @property
    def over(self) -> bool:
        """Whether nothing is written to its blocks any more."""
        return self._ended.is_set()

    @property
    def silent_seconds(self) -> float:
        """How long its call has been under way; 0 when it is over."""
        return 0.0 if self.over else time.monotonic() - self._heard

    def poll(self) -> Floats | None:
        """Without waiting: f32 [vocab] logits of the last token, None while it is not done. Raises
        why it ended early: `ExecutionError` when it was stopped, or what broke in it."""
        if self._error is not None:
            raise self._error
        return self._logits

    def stop(self) -> None:
        """Have it end after the call under way, without waiting for that."""
        self.stopped = True

    def advanced(self, tokens: int) -> None:
        """So many more tokens are in the cache."""
        self.tokens += tokens
        self._heard = time.monotonic()

    def end(self, logits: Floats | None, error: HmcError | None = None) -> None:
        """It is over."""
        self._logits, self._error = logits, error
        self._ended.set()


class DevicePrefill:
    """Computes prompts by one phase of an executor, for the thread that owns it; has the methods of
    `batching.process.PrefillKeeper`."""

    exclusive = True

    def __init__(
        self,
        run: Callable[[Ints, Ints, Ints, Ints], Floats],
        chunk: Callable[[int], int],
        give_up: Callable[[], None],
    ) -> None:
        """`run` makes a call of the phase (see `DevicePhase.run`), `chunk(left)` is how many of the
        tokens left it takes; `give_up` ends a call that hangs, and everything else on its devices.
        """
        self._call, self._chunk, self._give_up = run, chunk, give_up
        self._job: DeviceJob | None = None
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

    def start(self, sequence: Sequence, ids: Ints) -> DeviceJob:
        """Compute `ids` i32 [tokens] after what a sequence holds, with room for all of them;
        `ExecutionError` while another prompt is under way."""
        if self.busy:
            raise ExecutionError("a prompt is under way on the devices: they take one at a time")
        self._job = job = DeviceJob()
        arguments = (job, sequence.row, sequence.length, np.array(ids, np.int32))
        self._thread = threading.Thread(
            target=self._run, args=arguments, name="hmc-prompt-beside", daemon=True
        )
        self._thread.start()
        return job

    def lost(self, error: HmcError) -> bool:
        """Never: what fails here would fail again."""
        return False

    def tend(self, wanted: bool) -> None:
        """Nothing needs it."""

    def end(self) -> None:
        """Nothing: a call ends when it ends."""

    def close(self) -> None:
        """End what is under way: when its call is over, in seconds otherwise."""
        if self._job is None or self._thread is None:
            return
        self._job.stop()
        self._thread.join(_CLOSE_SECONDS)
        if self._thread.is_alive():
            self._give_up()
            self._thread.join(_CLOSE_SECONDS)

    def _run(self, job: DeviceJob, row: int, past: int, ids: Ints) -> None:
        """The thread: call after call."""
        try:
            while job.tokens < len(ids):
                if job.stopped:
                    job.end(None, ExecutionError("the prompt was cancelled"))
                    return
                first = job.tokens
                count = self._chunk(len(ids) - first)
                last = first + count == len(ids)
                positions = np.arange(past + first, past + first + count, dtype=np.int32)
                rows = np.arange(count - 1 if last else count, count, dtype=np.int32)
                table = np.full(count, row, np.int32)
                logits = self._call(ids[first : first + count], positions, table, rows)
                found = logits[-1].copy() if last else None
                job.advanced(count)
        except HmcError as error:
            job.end(None, error)
        except Exception as fault:  # whatever it is, nobody may wait for ever
            wrapped = ExecutionError(f"a prompt beside failed: {type(fault).__name__}: {fault}")
            wrapped.__cause__ = fault
            job.end(None, wrapped)
        else:
            job.end(found)
