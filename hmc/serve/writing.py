"""Answers in the words of an interface: one writer for each takes what becomes known of a request
and makes events of it, or the whole.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Iterable, Mapping, Sequence
from contextlib import aclosing
from typing import Any, ClassVar

from starlette.requests import Request
from starlette.responses import Response

from hmc.errors import HmcError
from hmc.serve.faults import ApiError, of_error
from hmc.serve.generate import Answering, News
from hmc.serve.log import say
from hmc.serve.sse import COMMENT, EventStream, watched

Event = Mapping[str, Any] | str


class Writer(ABC):
    """Puts one answer into words. `stream` asks for events, which have names if `named`; `silence`
    is what a stream says while there is nothing to say.
    """

    named: ClassVar[bool] = False
    silence: ClassVar[str] = COMMENT

    def __init__(self, answering: Answering, known: str, *, stream: bool) -> None:
        """`known` is the answer's id."""
        self.answering, self.id, self.stream = answering, known, stream

    def begin(self) -> Iterable[Event]:
        """What is said before anything is known."""
        return ()

    @abstractmethod
    def said(self, news: News) -> Iterable[Event]:
        """The events of news."""

    def end(self) -> Iterable[Event]:
        """What is said when every choice has ended."""
        return ()

    @abstractmethod
    def failed(self, fault: ApiError) -> Iterable[Event]:
        """What is said instead when one ended with an error."""

    @abstractmethod
    def whole(self, told: Sequence[News]) -> dict[str, Any]:
        """The answer without a stream, of everything that every choice has said."""


async def answer(request: Request, writer: Writer, keep_alive: float) -> Response:
    """Of what was submitted, a stream of events, or the whole once every choice has ended; a client
    that hangs up cancels them.
    """
    answering = writer.answering
    if writer.stream:
        return EventStream(
            _events(writer),
            keep_alive=keep_alive,
            gone=answering.cancel,
            named=writer.named,
            silence=writer.silence,
        )
    async with watched(request.receive, answering.cancel), aclosing(answering.news()) as news:
        async for _ in news:
            pass
    # A model may write half a character as an escape, which is JSON and no UTF-8.
    text = json.dumps(writer.whole(answering.told()), separators=(",", ":"))
    return Response(text, media_type="application/json")


async def _events(writer: Writer) -> AsyncGenerator[Event, None]:
    try:
        async with aclosing(writer.answering.news()) as coming:
            for event in writer.begin():
                yield event
            async for news in coming:
                for event in writer.said(news):
                    yield event
    except HmcError as error:
        fault = of_error(error)
        if fault.status >= 500:
            say(f"{writer.id}: its stream ends with an error: {fault.message}")
        for event in writer.failed(fault):
            yield event
        return
    for event in writer.end():
        yield event
