"""/v1/completions and /v1/chat/completions: whole answers and streams of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hmc.errors import HmcError
from hmc.runtime.tokens.requests import TokenLogprob, Update
from hmc.serve import prepare
from hmc.serve.answers import Head, Names, tool_calls, usage
from hmc.serve.bodies import ChatBody, CompletionBody
from hmc.serve.delivery import Hub, Replies
from hmc.serve.faults import of_error
from hmc.serve.metrics import Metrics
from hmc.serve.prepare import Prepared
from hmc.serve.service import Service
from hmc.serve.sse import EventStream, watched
from hmc.serve.tools import Call, CallFinder

AnyBody = CompletionBody | ChatBody


@dataclass
class _Choice:
    """What one choice has said so far."""

    finder: CallFinder | None = None
    text: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scored: Sequence[TokenLogprob] | None = None
    reason: str | None = None
    offset: int = 0
    begun: bool = False

    def take(self, update: Update) -> tuple[str, list[Call]]:
        """Add an update; the text and the calls that became certain with it."""
        self.tokens += update.token_ids
        self.logprobs += update.logprobs
        if update.prompt_logprobs is not None:
            self.scored = update.prompt_logprobs
        text, calls = update.piece, list[Call]()
        if self.finder is not None:
            text, calls = self.finder.push(update.piece)
        if update.finish_reason is not None:
            if self.finder is not None:
                rest, last = self.finder.flush()
                text, calls = text + rest, calls + last
            ended = update.finish_reason == "stop"
            self.reason = "tool_calls" if ended and (self.calls or calls) else update.finish_reason
        self.text += text
        self.calls += calls
        return text, calls


class Generation:
    """One HTTP request for tokens on its way; what completions and chats share."""

    def __init__(
        self, service: Service, hub: Hub, metrics: Metrics, prepared: Prepared, names: Names
    ) -> None:
        self.prepared, self.names = prepared, names
        self.replies = Replies(hub)
        self.choices = [_Choice(prepared.finder()) for _ in prepared.requests]
        self._service, self._metrics = service, metrics
        self._cached = 0

    def submit(self) -> None:
        """Hand it to the scheduler; raises what that refuses with."""
        _, scheduler = self._service.ready()
        self.replies.submit(scheduler, self.prepared.requests)

    async def updates(self) -> AsyncGenerator[tuple[int, Update, str, list[Call]], None]:
        """(choice, update, new text, new calls) until all have ended; cancels what is left when it
        is closed early.
        """
        try:
            async for index, update in self.replies.updates():
                choice = self.choices[index]
                times = update.timings
                if times is not None and times.new_tokens and update.finish_reason != "cancelled":
                    self._metrics.observe(times)
                    self._service.ttft.append(times.ttft_s)
                whole = index % self.prepared.choices_per_prompt == 0  # of each prompt one
                if update.finish_reason is not None and whole:
                    self._cached += update.cached_tokens
                yield index, update, *choice.take(update)
        finally:
            self.replies.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens counted so far; each prompt once."""
        new = sum(len(choice.tokens) for choice in self.choices)
        return usage(self.prepared.prompt_tokens, new, self._cached)


@dataclass(frozen=True)
class _News:
    """What has come of a choice, by its number, since the last: `first` when nothing was said of it
    before.
    """

    index: int
    first: bool
    text: str
    calls: Sequence[Call]
    logprobs: Sequence[TokenLogprob]
    tokens: Sequence[int]


Said = Callable[[_News], dict[str, Any]]
"""What an answer says of a choice."""


class Generations:
    """The two routes."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._hub: Hub | None = None

    async def completions(self, request: Request, body: CompletionBody) -> Response:
        """POST /v1/completions."""
        prepared = await asyncio.to_thread(prepare.completions, self._service, body)
        generation = self._generation(prepared)
        for index, choice in enumerate(generation.choices):
            if body.echo:
                choice.text = self._echoed(body, prepared, index)
        head = Head("cmpl", "text_completion", self._service.settings.name)
        said = partial(_completion, generation, body)
        return await self._answer(request, body, generation, head, said)

    async def chat(self, request: Request, body: ChatBody) -> Response:
        """POST /v1/chat/completions."""
        prepared = await asyncio.to_thread(prepare.chat, self._service, body)
        generation = self._generation(prepared)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = Head("chatcmpl", kind, self._service.settings.name)
        said = partial(_chat, generation, body)
        return await self._answer(request, body, generation, head, said)

    def _generation(self, prepared: Prepared) -> Generation:
        if self._hub is None:  # the loop runs now
            self._hub = Hub()
        names = Names(self._service.vocabulary)
        return Generation(self._service, self._hub, self._metrics, prepared, names)

    async def _answer(
        self, request: Request, body: AnyBody, generation: Generation, head: Head, said: Said
    ) -> Response:
        """A stream of chunks, or the whole once every choice has ended; a client that hangs up
        cancels them.
        """
        generation.submit()
        cancel = generation.replies.cancel
        if body.stream:
            chunks = _chunks(generation, head, body, said)
            keep_alive = self._service.settings.keep_alive_seconds
            return EventStream(chunks, keep_alive=keep_alive, gone=cancel)
        async with watched(request.receive, cancel):
            async for _ in generation.updates():
                pass
        parts = [
            _part(generation, body, said, _News(i, True, c.text, c.calls, c.logprobs, c.tokens))
            for i, c in enumerate(generation.choices)
        ]
        return JSONResponse(head.part(parts, usage=generation.usage()))

    def _echoed(self, body: CompletionBody, prepared: Prepared, index: int) -> str:
        engine, _ = self._service.ready()
        if isinstance(body.prompt, str):
            return body.prompt
        given = body.prompt[index // body.n]
        if isinstance(given, str):
            return given
        return engine.text.decode(prepared.requests[index].ids.tolist()) if engine.text else ""


async def _chunks(
    generation: Generation, head: Head, body: AnyBody, said: Said
) -> AsyncGenerator[dict[str, Any] | str, None]:
    updates = generation.updates()
    wants_all = body.return_token_ids or body.logprobs not in (None, False)
    try:
        async for index, update, text, calls in updates:
            choice = generation.choices[index]
            first, choice.begun = not choice.begun, True
            if first or text or calls or choice.reason is not None or wants_all:
                news = _News(index, first, text, calls, update.logprobs, update.token_ids)
                yield head.part([_part(generation, body, said, news)])
    except HmcError as error:
        yield of_error(error).body()
        return
    finally:
        await updates.aclose()
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.part([], usage=generation.usage())
    yield "[DONE]"


def _part(generation: Generation, body: AnyBody, said: Said, news: _News) -> dict[str, Any]:
    reason = generation.choices[news.index].reason
    part = {"index": news.index, **said(news), "finish_reason": reason}
    return part | {"token_ids": list(news.tokens)} if body.return_token_ids else part


def _completion(generation: Generation, body: CompletionBody, news: _News) -> dict[str, Any]:
    choice = generation.choices[news.index]
    text, entries = news.text, list[TokenLogprob | int](news.logprobs)
    if news.first and body.echo:
        text = choice.text
        if choice.scored is not None:  # the first token has no log-probability
            given = int(generation.prepared.requests[news.index].ids[0])
            entries = [given, *choice.scored, *entries]
    logprobs = None
    if body.logprobs is not None:
        logprobs, choice.offset = generation.names.completion(entries, choice.offset)
    return {"text": text, "logprobs": logprobs}


def _chat(generation: Generation, body: ChatBody, news: _News) -> dict[str, Any]:
    text, calls = news.text, news.calls
    logprobs = generation.names.chat(news.logprobs) if body.logprobs else None
    if body.stream:
        delta: dict[str, Any] = {"role": "assistant"} if news.first else {}
        if news.first or text:
            delta["content"] = text
        if calls:
            before = len(generation.choices[news.index].calls) - len(calls)
            delta["tool_calls"] = tool_calls(calls, before, indexed=True)
        return {"delta": delta, "logprobs": logprobs}
    message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
    if calls:
        listed = tool_calls(calls, indexed=False)
        message |= {"content": text.strip() or None, "tool_calls": listed}
    return {"message": message, "logprobs": logprobs}
