"""Runs the application: the socket, signals, and how the process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType

import uvicorn

from hmc.errors import UsageError
from hmc.plan import Plan
from hmc.serve.app import application
from hmc.serve.service import Service, Settings

_CLIENT_SECONDS = 5.0
_LOOPBACK = ("127.", "::1", "localhost")


class Server(uvicorn.Server):
    """uvicorn that drains on the first SIGTERM or SIGINT and ends at once on the second."""

    def __init__(self, plan: Plan, settings: Settings) -> None:
        self.service = Service(plan, settings)
        super().__init__(
            uvicorn.Config(
                application(self.service, self.stop),
                http="h11",
                ws="none",
                lifespan="on",
                log_level="warning",
                access_log=False,
                server_header=False,
                timeout_keep_alive=60,
            )
        )

    def stop(self) -> None:
        """From any thread: take no new requests, finish the others, end."""
        self.service.drain()
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which waits for every client; those that do not read their answer, or never
        finish their question, are left once everything accepted has been answered.
        """
        leaving = asyncio.create_task(self._leave_clients())
        await super().shutdown(sockets)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving

    async def _leave_clients(self) -> None:
        while not self.service.answered:  # the watchdog ends a step that hangs
            await asyncio.sleep(0.1)
        await asyncio.sleep(_CLIENT_SECONDS)
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """Handle signals for the length of a `with` (in the main thread, the only one that can);
        unlike uvicorn's own, they are not raised again at its end.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        signals = (signal.SIGTERM, signal.SIGINT)
        before = {number: signal.signal(number, self.handle_exit) for number in signals}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.should_exit:
            os._exit(128 + sig)
        self.stop()


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `UsageError` when there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host} port {port}: {reason}") from error


def serve(plan: Plan, settings: Settings, host: str, port: int) -> None:
    """Serve until a signal; returns once everything accepted has been answered.

    Raises what loading the engine raises, and `UsageError` when the address cannot be had.
    """
    server = Server(plan, settings)
    with listen(host, port) as listener:
        address = f"[{host}]" if ":" in host else host
        bound = listener.getsockname()[1]
        if settings.api_key is None and not host.startswith(_LOOPBACK):
            print(
                f"hmc: warning: {host} is not a loopback address and there is no --api-key:"
                " whoever reaches this port can use the model",
                file=sys.stderr,
            )
        print(f"hmc: serving {settings.name} on http://{address}:{bound}", file=sys.stderr)
        print(f"hmc: {settings.prefill.reason}", file=sys.stderr)
        sys.stderr.flush()
        server.run(sockets=[listener])
    if server.service.failure is not None:
        raise server.service.failure
