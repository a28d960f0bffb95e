"""Updates from the scheduler's thread to the event loop; hides how the two meet.

All updates of a step wake the loop once, however many requests it had.
"""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Sequence

from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.tokens.requests import Listener, Request, Ticket, Update


class Hub:
    """Takes updates in any thread and hands them out in the loop it was made in."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._waiting: deque[tuple[Replies, int, Update]] = deque()
        self._lock = threading.Lock()
        self._coming = False  # a hand-out is on its way

    def put(self, replies: Replies, index: int, update: Update) -> None:
        """From any thread; never blocks."""
        with self._lock:
            self._waiting.append((replies, index, update))
            if self._coming:
                return
            self._coming = True
        self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        with self._lock:
            self._coming = False
        while self._waiting:
            replies, index, update = self._waiting.popleft()
            replies.queue.put_nowait((index, update))


class Replies:
    """The updates of the choices of one HTTP request, as they come."""

    def __init__(self, hub: Hub) -> None:
        self.queue: asyncio.Queue[tuple[int, Update]] = asyncio.Queue()
        self._hub = hub
        self._tickets: list[Ticket] = []
        self._open = 0

    def submit(
        self, scheduler: Scheduler, requests: Sequence[Request], *, held: bool = False
    ) -> None:
        """Submit them all or none, `held` in places of the queue that the caller holds; raises what
        `Scheduler.submit` raises.
        """
        for index, request in enumerate(requests):
            request.listener = self._listener(index)
            try:
                self._tickets.append(scheduler.submit(request, held=held))
            except BaseException:
                self.cancel()
                raise
        self._open = len(requests)

    def cancel(self) -> None:
        """End what has not ended."""
        for ticket in self._tickets:
            if not ticket.done:
                ticket.cancel()

    async def updates(self) -> AsyncIterator[tuple[int, Update]]:
        """(choice, update) until every choice has ended; raises the error that a choice ended
        with.
        """
        while self._open:
            index, update = await self.queue.get()
            if update.finish_reason is not None:
                self._open -= 1
            if update.error is not None:
                raise update.error
            yield index, update

    def _listener(self, index: int) -> Listener:
        return lambda update: self._hub.put(self, index, update)
