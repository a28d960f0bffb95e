"""A request and the model it asks for: while that is loading the request waits, and a stream is
kept alive by comments; hides when the model is let go of again.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager

from pydantic import ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hmc.errors import HmcError
from hmc.serve.faults import ApiError, of
from hmc.serve.log import note_fault, note_model
from hmc.serve.models import Model, Models, Use
from hmc.serve.service import Service
from hmc.serve.sse import watched

_USE = "hmc.use"
_HEADERS = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}

Answer = Callable[[Service], Awaitable[Response]]
"""Answers a request with what is loaded."""

Told = Callable[[ApiError], str]
"""An error as an event of a stream, as it is sent."""


def openai_event(fault: ApiError) -> str:
    """An error in a stream as OpenAI's clients read it."""
    return f"data: {json.dumps(fault.body())}\n\n"


async def with_model(
    models: Models,
    model: Model,
    request: Request,
    answer: Answer,
    *,
    streams: bool = False,
    told: Told = openai_event,
) -> Response:
    """What `answer` gives once the model is loaded; the model is not unloaded before all of it is
    sent. A stream that waits for longer than `keep_alive_seconds` begins with comments, and what
    goes wrong from then on is an event of it, by `told`.

    Raises what `Use.ready` and `answer` raise, and `ClientDisconnect` when nobody waits any more.
    """
    note_model(request.scope, model.name)
    use = request.scope[_USE] = models.use(model)
    seconds = model.settings.keep_alive_seconds
    if not model.loaded:
        async with _while_connected(request.receive):
            if streams and not await use.soon(seconds):
                return _Opening(use, answer, told, seconds)
            await use.ready()
    return await answer(await use.ready())


class Uses:
    """Ends a request's use of its model when the request has been answered, however that ends."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        try:
            await self._app(scope, receive, send)
        finally:
            if (use := scope.get(_USE)) is not None:
                use.end()


class _Opening(Response):
    """A stream whose model is still loading: comments, then what answers."""

    media_type = "text/event-stream"

    def __init__(self, use: Use, answer: Answer, told: Told, keep_alive: float) -> None:
        super().__init__(headers=_HEADERS)
        del self.headers["content-length"]
        self._use, self._answer, self._told, self._keep_alive = use, answer, told, keep_alive

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """The ASGI application."""
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        await send(_part(": loading\n\n"))
        try:
            async with _while_connected(receive):
                while self._use.left and not await self._use.soon(self._keep_alive):
                    await send(_part(": loading\n\n"))
            response = await self._answer(await self._use.ready())
        except ClientDisconnect:
            return
        except (ApiError, ValidationError, HmcError) as error:
            fault = of(error)
            if fault.status >= 500:
                note_fault(scope, fault.message)
            await send(_part(self._told(fault)))
            await send({"type": "http.response.body", "body": b"", "more_body": False})
            return

        async def rest(message: Message) -> None:
            if message["type"] != "http.response.start":
                await send(message)

        await response(scope, receive, rest)


def _part(text: str) -> Message:
    return {"type": "http.response.body", "body": text.encode(), "more_body": True}


@asynccontextmanager
async def _while_connected(receive: Receive) -> AsyncIterator[None]:
    """Cancel what is done in the `with` when the client hangs up; `ClientDisconnect` then."""
    task, gone = asyncio.current_task(), False
    assert task is not None

    def leave() -> None:
        nonlocal gone
        gone = True
        task.cancel()

    try:
        async with watched(receive, leave):
            yield
    except asyncio.CancelledError:
        if not gone:
            raise
        task.uncancel()
        raise ClientDisconnect from None
