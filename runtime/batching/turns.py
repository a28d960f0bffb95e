"""Whose prompt gets the next chunk; hides how short prompts overtake long ones and long ones are
never held up for good.

Chunks go to the prompt with the fewest tokens left; but after every one that overtook the prompt
that has waited longest, that one gets a chunk. So a short prompt waits for one chunk of a long one
at most and for prompts shorter than itself, and a long one has half of all chunks at least as soon
as none is older.
"""

from __future__ import annotations

from collections.abc import Collection

from hmc.runtime.batching.job import Job


class Turns:
    """Remembers whether the oldest prompt has been overtaken."""

    def __init__(self) -> None:
        self._owed = False

    def order(self, jobs: Collection[Job]) -> list[Job]:
        """Admitted requests with unfinished prompts, the one whose turn it is first."""
        waiting = sorted(jobs, key=lambda job: (job.left, job.ticket.id))
        if self._owed and waiting:
            oldest = min(waiting, key=age)
            waiting.remove(oldest)
            waiting.insert(0, oldest)
        return waiting

    def took(self, job: Job, among: Collection[Job]) -> None:
        """The request got a chunk; `among` are those that could have got it."""
        self._owed = job is not min(among, key=age)


def age(job: Job) -> int:
    """A key that sorts requests by their arrival, the oldest first."""
    return job.ticket.id
