"""What the server tells its operator on stderr: a line for every request where that is asked for,
for every answer of 5xx always; and the id by which a request is found in it. A line that cannot be
written (a full disk, a reader that is gone) is felt by no request: it is counted.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
import uuid
from typing import Literal

from starlette.types import ASGIApp, Message, Receive, Scope, Send

Access = Literal["off", "text", "json"]

_ID = re.compile(rb"[A-Za-z0-9_.:-]{1,128}")
_FAULT, _MODEL, _KNOWN_AS = "hmc.fault", "hmc.model", "hmc.request_id"


class _Lines:
    """Lines on stderr, and how many could not be written; for any thread."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.lost = self._untold = 0

    def write(self, line: str) -> None:
        """A line, after a word on those lost since the last."""
        with self._lock:
            try:
                if self._untold:
                    told = f"hmc: {self._untold} lines before this one could not be written in time"
                    print(told, file=sys.stderr, flush=True)
                    self._untold = 0
                print(line, file=sys.stderr, flush=True)
            except OSError:
                self.lost += 1
                self._untold += 1


_LINES = _Lines()


def say(text: str) -> None:
    """A line to the operator."""
    _LINES.write(f"hmc: {text}")


def lost_lines() -> int:
    """How many could not be written since the process began."""
    return _LINES.lost


def note_fault(scope: Scope, message: str) -> None:
    """Why a request fails, for its line."""
    scope[_FAULT] = message


def request_id(scope: Scope) -> str:
    """By what a request is found in the log; "" outside `RequestLog`."""
    return str(scope.get(_KNOWN_AS, ""))


def note_model(scope: Scope, name: str) -> None:
    """Which model a request asks for, for its line."""
    scope[_MODEL] = name


class RequestLog:
    """Gives each request an id (the client's `x-request-id`, where it sends a plain one), answers
    with it, and writes the lines. Polling /health while the model loads makes none.
    """

    def __init__(self, app: ASGIApp, access: Access) -> None:
        self._app, self._access = app, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        given = dict(scope["headers"]).get(b"x-request-id", b"")
        known = given if _ID.fullmatch(given) else f"req-{uuid.uuid4().hex}".encode()
        scope[_KNOWN_AS] = known.decode()
        begin, status, sent = time.monotonic(), 499, 0

        async def tagged(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", known)]
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, tagged)
        finally:
            self._tell(scope, known.decode(), status, time.monotonic() - begin, sent)

    def _tell(self, scope: Scope, known: str, status: int, seconds: float, sent: int) -> None:
        fault, model = scope.get(_FAULT, ""), scope.get(_MODEL, "")
        failed = (status >= 500 or bool(fault)) and scope["path"] != "/health"
        client = (scope.get("client") or ("-",))[0]
        if self._access == "json":
            entry = {"time": round(time.time(), 3), "id": known, "client": client}
            entry |= {"method": scope["method"], "path": scope["path"], "status": status}
            entry |= {"seconds": round(seconds, 4), "bytes": sent}
            entry |= {"model": model} if model else {}
            _LINES.write(json.dumps(entry | ({"error": fault} if fault else {})))
        elif failed or self._access == "text":
            stamp = time.strftime("%Y-%m-%dT%H:%M:%S%z")
            asked = json.dumps(f"{scope['method']} {scope['path']}")  # one line, whatever it holds
            line = f"{stamp} {client} {asked} {status} {seconds:.3f}s {sent}B {known}"
            line += f" {model}" if model else ""
            say(f"{line}: {fault}" if fault else line)
