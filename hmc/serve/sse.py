"""Server-sent events over ASGI: one `data:` line an event, with its type as its name where the
interface has names, a comment or another sign of life while nothing happens; and noticing that a
client has gone.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

Events = AsyncGenerator[Mapping[str, Any] | str, None]

COMMENT = ": keep-alive\n\n"
"""What clients skip."""

_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}


class EventStream(Response):
    """Sends events as they come, and `silence` after every `keep_alive` seconds without any.

    `gone` is called when the client hangs up; `events` is closed however the stream ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: Events,
        *,
        keep_alive: float,
        gone: Callable[[], None],
        named: bool = False,
        silence: str = COMMENT,
    ) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._named, self._silence = named, silence
        self._events, self._keep_alive, self._gone = events, keep_alive, gone
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        self._sent = time.monotonic()
        try:
            async with watched(receive, self._gone), _background(self._comments(send)):
                async for event in self._events:
                    self._sent = time.monotonic()
                    await _part(send, self._written(event))
        finally:
            await self._events.aclose()
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _written(self, event: Mapping[str, Any] | str) -> str:
        if isinstance(event, str):
            return f"data: {event}\n\n"
        name = f"event: {event['type']}\n" if self._named else ""
        return f"{name}data: {json.dumps(event)}\n\n"

    async def _comments(self, send: Send) -> None:
        while True:
            left = self._sent + self._keep_alive - time.monotonic()
            if left > 0:
                await asyncio.sleep(left)
                continue
            self._sent = time.monotonic()
            await _part(send, self._silence)


@asynccontextmanager
async def watched(receive: Receive, gone: Callable[[], None]) -> AsyncIterator[None]:
    """Call `gone` if the client hangs up during the `with`; the request's body has been read."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        gone()

    async with _background(watch()):
        yield


@asynccontextmanager
async def _background(work: Any) -> AsyncIterator[None]:
    task = asyncio.ensure_future(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait({task})


async def _part(send: Send, text: str) -> None:
    await send({"type": "http.response.body", "body": text.encode(), "more_body": True})
