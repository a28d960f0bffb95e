"""Room in the cache for the requests being computed: what a request needs to begin, growing block
by block, and who makes room when there is none; hides how much is kept free.

A request begins with blocks for what is known of it, its prompt and (after a preemption) its answer
so far. It gets more as it grows. When none is left, the request that came last gives its blocks
back and waits in the queue again: the oldest never does, so there is always one that goes on to
its end.
"""

from __future__ import annotations

from collections.abc import Collection

from hmc.errors import CapacityError
from hmc.runtime.batching.job import Job
from hmc.runtime.executor import Executor
from hmc.runtime.memory.kv import Sequence


class Room:
    """Rows and blocks of an executor's cache."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor
        self._released = 0

    def enter(self, job: Job, others: int) -> bool:
        """Give a request a row and blocks for all that is known of it, beside `others` that hold
        some, each of whom finds one block more; False when it has to wait.
        """
        kv = self._executor.kv
        if not kv.rows_free or job.tried == self._released:
            return False
        if self._open(job) < others:
            self._executor.release(job.place)
            job.tried = self._released
            return False
        self._reserve(job)
        return True

    def begin(self, job: Job) -> None:
        """Before the first chunk: enter again, and share what others have computed meanwhile. That
        takes no more blocks than were its own.
        """
        self._executor.release(job.place)
        self._open(job)
        self._reserve(job)

    def release(self, sequence: Sequence) -> None:
        """Take row and blocks back."""
        self._executor.release(sequence)
        self._released += 1

    def keep(self, job: Job) -> None:
        """Before blocks are taken back of a request that will go on later: as long as nobody needs
        them, it finds them again.
        """
        if job.answer.tokens:
            self._executor.kv.keep_own(job.place, job.known, len(job.ids), job.ticket.id)

    def has_next(self, job: Job) -> bool:
        """Reserve the place of the token that a running request stores next; False without room."""
        kv = self._executor.kv
        if kv.spare(job.place, 1) < 0:
            return False
        kv.reserve(job.place, 1)
        return True

    def _open(self, job: Job) -> int:
        """Give a request a row; how many blocks will be left when it has all that it needs."""
        kv, known = self._executor.kv, job.known
        job.sequence = self._executor.open()
        if job.scored is None:
            job.shared = kv.adopt(job.place, known, len(job.ids), job.ticket.id)
        return kv.spare(job.place, len(known) - job.place.length)

    def _reserve(self, job: Job) -> None:
        self._executor.kv.reserve(job.place, len(job.known) - job.place.length)


def no_room(job: Job) -> CapacityError:
    """The error of a request that finds no room though it is alone."""
    return CapacityError(
        f"request {job.ticket.id} finds no room in the KV cache though nothing runs: somebody else"
        " holds sequences of this executor"
    )


def youngest(jobs: Collection[Job]) -> Job:
    """The one that came last."""
    return max(jobs, key=lambda job: job.ticket.id)
