"""Which tokens a request may say next: asked of its mask while the model computes, and applied to
logits; hides the threads that ask.

A mask knows all tokens before a decode call begins, and takes milliseconds with a large vocabulary:
asked one after the other behind the call, those of many requests would take longer than the model.
"""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import numpy.typing as npt

from hmc.errors import ExecutionError
from hmc.runtime.batching.job import Job

_THREADS = 4

Allowed = npt.NDArray[np.bool_] | None


class Masks:
    """For the scheduler's thread; `close` ends the threads."""

    def __init__(self) -> None:
        self._threads: ThreadPoolExecutor | None = None
        self._coming: dict[Job, Future[Allowed]] = {}

    def ahead(self, jobs: Iterable[Job]) -> None:
        """Begin to ask for the tokens allowed after the decode call that stores the pending ones
        of `jobs`.
        """
        self._coming = {}
        for job in jobs:
            mask, known = job.request.mask, len(job.ids) + len(job.answer.tokens)
            if mask is not None and job.place.length + 1 == known:
                if self._threads is None:
                    self._threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="hmc-mask")
                self._coming[job] = self._threads.submit(mask, list(job.answer.tokens))

    def applied(self, job: Job, logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """f32 logits [vocab] with those of forbidden tokens at -inf. Raises what the mask raises,
        and `ExecutionError` for one of another form or that allows nothing.
        """
        mask, coming = job.request.mask, self._coming.pop(job, None)
        if mask is None:
            return logits
        allowed = mask(list(job.answer.tokens)) if coming is None else coming.result()
        if allowed is None:
            return logits
        if allowed.shape != logits.shape or allowed.dtype != np.bool_:
            raise ExecutionError(
                f"request {job.ticket.id}: its mask is {allowed.dtype} {list(allowed.shape)}, not"
                f" bool {list(logits.shape)}"
            )
        if not allowed.any():
            raise ExecutionError(f"request {job.ticket.id}: its mask allows no token")
        return np.where(allowed, logits, np.float32(-np.inf))

    def close(self) -> None:
        """Ask no more; what is being asked is left behind."""
        if self._threads is not None:
            self._threads.shutdown(wait=False, cancel_futures=True)
