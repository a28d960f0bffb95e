"""Runs the application: the socket, signals, and how the process ends."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Generator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import uvicorn

from hmc.errors import UsageError
from hmc.serve.app import application
from hmc.serve.connections import Connection, Listener
from hmc.serve.hosts import is_loopback
from hmc.serve.log import say
from hmc.serve.models import Models

_CLIENT_SECONDS = 5.0


class Server(uvicorn.Server):
    """uvicorn that drains on the first SIGTERM or SIGINT and ends at once on the second."""

    def __init__(self, models: Models) -> None:
        self.models = models
        super().__init__(
            uvicorn.Config(
                application(models, self.stop),
                http=Connection,
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
        self.models.drain()
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, with listeners that count connections."""
        await super().startup(sockets=[])
        state, app_state = self.server_state, self.lifespan.state

        def make() -> Connection:
            return Connection(self.config, state, app_state)

        listeners: list[Any] = [Listener(each, state.connections, make) for each in sockets or ()]
        self.servers = listeners

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn's, ten times a second."""
        if counter % 10 == 0:
            self._tend()
        return await super().on_tick(counter)

    def _tend(self) -> None:
        connections: list[Any] = list(self.server_state.connections)
        for connection in connections:
            connection.tend()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, which waits for every client; those that do not read their answer, or never
        finish their question, are left once everything accepted has been answered, or when
        `drain_seconds` are over.
        """
        leaving = asyncio.create_task(self._leave_clients())
        await super().shutdown(sockets)
        leaving.cancel()
        with suppress(asyncio.CancelledError):
            await leaving

    async def _leave_clients(self) -> None:
        loop, seconds = asyncio.get_running_loop(), self.models.settings.drain_seconds
        end = loop.time() + seconds
        while not self.models.answered and loop.time() < end:
            await asyncio.sleep(0.1)
        if not self.models.answered:
            say(f"what has not been answered {seconds:g} s after the signal is cut off")
        await asyncio.sleep(min(_CLIENT_SECONDS, max(0.0, end - loop.time())))
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


@contextmanager
def listen_unix(path: str) -> Generator[socket.socket, None, None]:
    """A listening socket in the file system for the length of a `with`; one that nobody answers any
    more is replaced. `UsageError` when there can be none.
    """
    with socket.socket(socket.AF_UNIX) as listener:
        try:
            _free(path)
            listener.bind(path)
            listener.listen(1024)
        except OSError as error:
            raise UsageError(f"cannot listen on {path}: {error.strerror or error}") from error
        yield listener
    with suppress(OSError):
        os.unlink(path)


def _free(path: str) -> None:
    """Remove a socket that nobody answers."""
    with socket.socket(socket.AF_UNIX) as other:
        try:
            other.connect(path)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            os.unlink(path)
            return
    raise UsageError(f"cannot listen on {path}: somebody else does")


def listen(host: str, port: int) -> socket.socket:
    """A listening socket; `UsageError` when there can be none."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"cannot listen on {host} port {port}: {reason}") from error


def serve(models: Models, host: str, port: int, unix: str | None = None) -> None:
    """Serve until a signal, on a host's port or on a socket `unix`; returns once everything that
    was accepted has been answered, or `drain_seconds` are over.

    Raises what loading the only plan raises, and `UsageError` when the address cannot be had.
    """
    server, settings = Server(models), models.settings
    with listen_unix(unix) if unix is not None else listen(host, port) as listener:
        if unix is not None:
            where = f"unix:{unix}"
        else:
            address = f"[{host}]" if ":" in host else host
            where = f"http://{address}:{listener.getsockname()[1]}"
            if not settings.api_keys and not is_loopback(host):
                say(
                    f"warning: {host} is not a loopback address and there is no --api-key:"
                    " whoever reaches this port can use the model"
                )
        say(f"serving {', '.join(model.name for model in models)} on {where}")
        for model in models:
            reason = model.settings.prefill.reason
            say(reason if models.only else f"{model.name}: {reason}")
        server.run(sockets=[listener])
    if models.failure is not None:
        raise models.failure
