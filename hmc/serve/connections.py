"""Connections: accepted one at a time and never more than file descriptors allow, and none waits
for its client for ever; hides uvicorn's protocol and asyncio's transports.
"""

from __future__ import annotations

import asyncio
import os
import resource
import socket
from collections.abc import Callable
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from hmc.serve.log import say

HEAD_SECONDS = 10.0
"""For a request's line and headers, from the first byte on, or from the connection on."""

WRITE_SECONDS = 30.0
"""Without a byte that the client has read of what waits for it."""

ROOM_SECONDS = 0.25
"""A connection that has waited no longer for its client is not ended for another one: what was sent
may be on its way."""

_PROBE_SECONDS = 30
"""Of silence before the first probe of TCP."""

_CLOSE = (b"connection", b"close")

_KEPT = 32
"""Descriptors for all else: shards while they are read, pipes of processes, the log."""


class Connection(H11Protocol):
    """uvicorn's, that knows how long it has been waiting for its client."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """asyncio's."""
        super().connection_made(transport)
        self._begun = self._read = self.loop.time()
        self._unread = 0

    def data_received(self, data: bytes) -> None:
        """asyncio's."""
        if self.timeout_keep_alive_task is not None:
            self._begun = self.loop.time()
        super().data_received(data)

    @property
    def waits_since(self) -> float | None:
        """Since when a client has to say something or to read something; None while it is the
        server's turn.
        """
        if self.flow.write_paused or self.transport.is_closing():
            return self._read
        answering = self.cycle is not None and not self.cycle.response_complete
        if answering and not self.cycle.more_body:
            return None
        return self._begun

    def answer_last(self) -> None:
        """Have the answer that has not begun tell the client that the connection ends with it."""
        cycle = self.cycle
        if cycle is not None and not cycle.response_started and _CLOSE not in cycle.default_headers:
            cycle.default_headers = [*cycle.default_headers, _CLOSE]

    def tend(self) -> None:
        """End what has waited too long; to be called every second or so. Bodies have a deadline in
        `reading.py`, which can answer, idle connections one of uvicorn's.
        """
        now, unread = self.loop.time(), self.transport.get_write_buffer_size()
        if unread < self._unread or not unread:
            self._read = now
        self._unread = unread
        stuck = self.flow.write_paused or self.transport.is_closing()
        silent = self.timeout_keep_alive_task is None and self.conn.their_state is h11.IDLE
        if (stuck and now - self._read > WRITE_SECONDS) or (
            silent and not stuck and now - self._begun > HEAD_SECONDS
        ):
            self.transport.abort()


class Listener:
    """Accepts connections of a socket; what uvicorn expects of an asyncio server. One more than
    `most` ends the one that has waited longest for its client; where all are being answered, new
    ones wait in the socket's queue, and the others end with their answers.
    """

    def __init__(
        self, listener: socket.socket, connections: set[Any], make: Callable[[], Connection]
    ) -> None:
        self._listener, self._connections, self._make = listener, connections, make
        self._most = most_connections()
        self._coming: set[asyncio.Task[Any]] = set()
        self._loop = asyncio.get_running_loop()
        self._told = False
        listener.setblocking(False)
        self._listen()

    def close(self) -> None:
        """Accept no more."""
        self._loop.remove_reader(self._listener)

    async def wait_closed(self) -> None:
        """asyncio's; nothing is left to wait for."""

    def _listen(self) -> None:
        if self._listener.fileno() >= 0:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        if len(self._connections) + len(self._coming) >= self._most and not self._make_room():
            self._pause(0.05)
            return
        try:
            accepted, _ = self._listener.accept()
        except (BlockingIOError, InterruptedError, ConnectionError):
            return
        except OSError as error:  # no descriptor or memory is left
            if not self._told:
                say(f"connections wait: {error.strerror}")
            self._told = True
            self._pause(1.0)
            return
        accepted.setblocking(False)
        # What lies between forgets silent connections, and a whole answer may take minutes.
        accepted.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        if accepted.family != socket.AF_UNIX:
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _PROBE_SECONDS)
            # asyncio does so where a socket names TCP, which one accepted from listen's does not.
            # Without it heads and tokens wait up to 40 ms for the client to acknowledge others.
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        task = self._loop.create_task(self._loop.connect_accepted_socket(self._make, accepted))
        self._coming.add(task)
        task.add_done_callback(self._coming.discard)

    def _make_room(self) -> bool:
        before = self._loop.time() - ROOM_SECONDS
        waits = [(since, id(c), c) for c in self._connections if (since := c.waits_since)]
        if waits and min(waits)[0] < before:
            min(waits)[-1].transport.abort()
            return True
        for connection in self._connections:
            connection.answer_last()
        return False

    def _pause(self, seconds: float) -> None:
        self._loop.remove_reader(self._listener)
        self._loop.call_later(seconds, self._listen)


def most_connections() -> int:
    """How many clients may be connected, by the descriptors that the process may open and has."""
    allowed, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY or hard > 1 << 20:
        hard = 1 << 20
    if allowed < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    left = max(allowed, hard) - len(os.listdir("/proc/self/fd"))
    return max(4, left - min(_KEPT, left // 2))
