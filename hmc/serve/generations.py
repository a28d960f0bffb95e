"""The routes that answer with tokens: a body is prepared, submitted and written in the words of the
interface that it came by.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hmc.serve import prepare
from hmc.serve.answers import Names
from hmc.serve.bodies import ChatBody, CompletionBody
from hmc.serve.chunks import ChatChunks, CompletionChunks
from hmc.serve.conversation import encoded
from hmc.serve.delivery import Hub
from hmc.serve.faults import ApiError
from hmc.serve.generate import Answering
from hmc.serve.log import request_id
from hmc.serve.messages import conversation as of_messages
from hmc.serve.messages.body import CountBody, MessagesBody
from hmc.serve.messages.writer import MessagesWriter
from hmc.serve.metrics import Metrics
from hmc.serve.prepare import Prepared
from hmc.serve.responses import conversation as of_responses
from hmc.serve.responses.body import ResponsesBody
from hmc.serve.responses.writer import ResponsesWriter
from hmc.serve.service import Service
from hmc.serve.writing import Writer, answer


class Generations:
    """What every such route needs."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._hub: Hub | None = None

    async def completions(
        self, service: Service, request: Request, body: CompletionBody
    ) -> Response:
        """POST /v1/completions."""

        def written(answering: Answering) -> Writer:
            names, text = Names(service.vocabulary), service.ready()[0].text
            return CompletionChunks(answering, body, service.settings.name, names, text)

        places = prepare.choices(service, body)
        return await self._answer(
            service, request, lambda: prepare.completions(service, body), written, places
        )

    async def chat(self, service: Service, request: Request, body: ChatBody) -> Response:
        """POST /v1/chat/completions."""

        def written(answering: Answering) -> Writer:
            return ChatChunks(answering, body, service.settings.name, Names(service.vocabulary))

        places = prepare.choices(service, body)
        return await self._answer(
            service, request, lambda: prepare.chat(service, body), written, places
        )

    async def messages(self, service: Service, request: Request, body: MessagesBody) -> Response:
        """POST /v1/messages."""

        def prepared() -> Prepared:
            return prepare.chat(service, of_messages.chat_of(body), clipped=True)

        def written(answering: Answering) -> Writer:
            return MessagesWriter(answering, body, service.settings.name)

        response = await self._answer(service, request, prepared, written)
        response.headers["request-id"] = request_id(request.scope)
        return response

    async def count(self, service: Service, request: Request, body: CountBody) -> Response:
        """POST /v1/messages/count_tokens."""

        def counted() -> int:
            text = prepare.text_of(service.ready()[0])
            return len(encoded(service, text, of_messages.chat_of(body)))

        _, scheduler = service.ready()
        with scheduler.places(1):
            count = await asyncio.to_thread(counted)
        headers = {"request-id": request_id(request.scope)}
        return JSONResponse({"input_tokens": count}, headers=headers)

    async def responses(self, service: Service, request: Request, body: ResponsesBody) -> Response:
        """POST /v1/responses."""

        def prepared() -> Prepared:
            try:
                return prepare.chat(service, of_responses.chat_of(body))
            except ApiError as fault:
                raise of_responses.in_its_words(fault) from None

        def written(answering: Answering) -> Writer:
            return ResponsesWriter(answering, body, service.settings.name)

        return await self._answer(service, request, prepared, written)

    async def _answer(
        self,
        service: Service,
        request: Request,
        prepared: Callable[[], Prepared],
        written: Callable[[Answering], Writer],
        places: int = 1,
    ) -> Response:
        """Hold places in the queue, prepare in a thread, submit, and write; raises what these
        refuse with.
        """
        if self._hub is None:  # the loop runs now
            self._hub = Hub()
        _, scheduler = service.ready()
        with scheduler.places(places):
            ready = await asyncio.to_thread(prepared)
            latencies = self._metrics.of(service.settings.name)
            answering = Answering(service, self._hub, latencies, ready)
            writer = written(answering)
            answering.submit(scheduler)
        return await answer(request, writer, service.settings.keep_alive_seconds)
