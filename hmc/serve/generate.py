"""/v1/completions and /v1/chat/completions: whole answers and streams of chunks."""

from __future__ import annotations

import asyncio
import time
import uuid
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from hmc.errors import HmcError
from hmc.runtime.batching.scheduler import Scheduler
from hmc.runtime.tokens.requests import TokenLogprob, Update
from hmc.serve import prepare
from hmc.serve.answers import Names, tool_calls
from hmc.serve.bodies import ChatBody, CompletionBody, StreamOptions
from hmc.serve.delivery import Hub, Replies
from hmc.serve.faults import of_error
from hmc.serve.log import say
from hmc.serve.metrics import Latencies, Metrics
from hmc.serve.prepare import Prepared
from hmc.serve.reasoning import ThoughtFinder
from hmc.serve.service import Service
from hmc.serve.sse import EventStream, watched
from hmc.serve.tools import Call, CallFinder

Asked = TypeVar("Asked", bound=CompletionBody | ChatBody)


@dataclass
class _Choice:
    """What one choice has said so far."""

    finder: CallFinder | None = None
    thoughts: ThoughtFinder | None = None
    most_calls: int | None = None
    text: str = ""
    thought: str = ""
    calls: list[Call] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    scored: Sequence[TokenLogprob] | None = None
    reason: str | None = None
    offset: int = 0
    begun: bool = False

    def take(self, update: Update) -> tuple[str, str, list[Call]]:
        """Add an update; the thought, the text and the calls that became certain with it."""
        self.tokens += update.token_ids
        self.logprobs += update.logprobs
        if update.prompt_logprobs is not None:
            self.scored = update.prompt_logprobs
        ends = update.finish_reason is not None
        thought, text, calls = "", update.piece, list[Call]()
        if self.thoughts is not None:
            thought, text = self.thoughts.push(text)
            last = self.thoughts.flush() if ends else ("", "")
            thought, text = thought + last[0], text + last[1]
        if self.finder is not None:
            text, calls = self.finder.push(text)
            if ends:
                rest, left = self.finder.flush()
                text, calls = text + rest, calls + left
            if self.most_calls is not None:
                calls = calls[: self.most_calls - len(self.calls)]
        self.thought += thought
        self.text += text
        self.calls += calls
        if ends:
            called = update.finish_reason == "stop" and self.calls
            self.reason = "tool_calls" if called else update.finish_reason
        return thought, text, calls


@dataclass(frozen=True)
class _News:
    """What has come of a choice, by its number, since the last: `first` when nothing was said of it
    before.
    """

    index: int
    first: bool
    thought: str
    text: str
    calls: Sequence[Call]
    logprobs: Sequence[TokenLogprob]
    tokens: Sequence[int]


class Generation(ABC, Generic[Asked]):
    """One HTTP request for tokens on its way; what completions and chats share. `prefix` is what
    ids of its answers begin with, `kind` what OpenAI calls them, with `chunk` when they stream.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk: ClassVar[str] = ""

    def __init__(
        self, service: Service, hub: Hub, latencies: Latencies, body: Asked, prepared: Prepared
    ) -> None:
        self._service, self._latencies = service, latencies
        self.body, self._prepared = body, prepared
        self._names = Names(service.vocabulary)
        self._replies = Replies(hub)
        self.choices = [
            _Choice(
                prepared.finder(),
                prepared.thought_finder(),
                prepared.most_calls,
                self._opening(i),
            )
            for i in range(len(prepared.requests))
        ]
        self._cached = 0

    def submit(self, scheduler: Scheduler) -> None:
        """Begin, in places that the caller holds; raises what the scheduler refuses with."""
        self._replies.submit(scheduler, self._prepared.requests, held=True)

    async def answer(self, request: Request) -> Response:
        """Of what was submitted, a stream of chunks, or the whole once every choice has ended; a
        client that hangs up cancels them.
        """
        head = {
            "id": f"{self.prefix}-{uuid.uuid4().hex}",
            "object": self.kind + (self.chunk if self.body.stream else ""),
            "created": int(time.time()),
            "model": self._service.settings.name,
        }
        cancel = self._replies.cancel
        if self.body.stream:
            keep_alive = self._service.settings.keep_alive_seconds
            return EventStream(self._chunks(head), keep_alive=keep_alive, gone=cancel)
        async with watched(request.receive, cancel):
            async for _ in self._updates():
                pass
        parts = [
            self._part(_News(i, True, c.thought, c.text, c.calls, c.logprobs, c.tokens))
            for i, c in enumerate(self.choices)
        ]
        return JSONResponse({**head, "choices": parts, "usage": self._usage()})

    def _opening(self, index: int) -> str:
        """What the text of a choice begins with."""
        return ""

    @abstractmethod
    def _said(self, news: _News) -> dict[str, Any]:
        """What an answer says of a choice."""

    async def _updates(self) -> AsyncGenerator[tuple[int, Update, str, str, list[Call]], None]:
        """(choice, update, new thought, text and calls) until all have ended; cancels what is left
        when it is closed early.
        """
        try:
            async for index, update in self._replies.updates():
                choice = self.choices[index]
                times = update.timings
                if times is not None and times.new_tokens and update.finish_reason != "cancelled":
                    self._latencies.observe(times)
                    self._service.ttft.append(times.ttft_s)
                whole = index % self._prepared.choices_per_prompt == 0  # of each prompt one
                if update.finish_reason is not None and whole:
                    self._cached += update.cached_tokens
                yield index, update, *choice.take(update)
        finally:
            self._replies.cancel()

    async def _chunks(self, head: dict[str, Any]) -> AsyncGenerator[dict[str, Any] | str, None]:
        updates, body = self._updates(), self.body
        options = body.stream_options or StreamOptions()
        wants_all = body.return_token_ids or body.logprobs not in (None, False)
        try:
            async for index, update, thought, text, calls in updates:
                choice = self.choices[index]
                first, choice.begun = not choice.begun, True
                if first or thought or text or calls or choice.reason is not None or wants_all:
                    said = (thought, text, calls, update.logprobs, update.token_ids)
                    chunk = {**head, "choices": [self._part(_News(index, first, *said))]}
                    yield chunk | (
                        {"usage": self._usage()} if options.continuous_usage_stats else {}
                    )
        except HmcError as error:
            fault = of_error(error)
            if fault.status >= 500:
                say(f"{head['id']}: its stream ends with an error: {fault.message}")
            yield fault.body()
            return
        finally:
            await updates.aclose()
        if options.include_usage:
            yield {**head, "choices": [], "usage": self._usage()}
        yield "[DONE]"

    def _part(self, news: _News) -> dict[str, Any]:
        reason = self.choices[news.index].reason
        part = {"index": news.index, **self._said(news), "finish_reason": reason}
        return part | {"token_ids": list(news.tokens)} if self.body.return_token_ids else part

    def _usage(self) -> dict[str, Any]:
        """Tokens counted so far; each prompt once."""
        new = sum(len(choice.tokens) for choice in self.choices)
        prompt = self._prepared.prompt_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


class _Completion(Generation[CompletionBody]):
    prefix, kind = "cmpl", "text_completion"

    def _opening(self, index: int) -> str:
        prompt = self.body.prompt
        given = prompt if isinstance(prompt, str) else prompt[index // self.body.n]
        if not self.body.echo:
            return ""
        if isinstance(given, str):
            return given
        engine, _ = self._service.ready()
        ids = self._prepared.requests[index].ids
        return engine.text.decode(ids.tolist()) if engine.text else ""

    def _said(self, news: _News) -> dict[str, Any]:
        choice = self.choices[news.index]
        text, entries = news.text, list[TokenLogprob | int](news.logprobs)
        if news.first and self.body.echo:
            text = choice.text
            if choice.scored is not None:  # the first token has no log-probability
                given = int(self._prepared.requests[news.index].ids[0])
                entries = [given, *choice.scored, *entries]
        logprobs = None
        if self.body.logprobs is not None:
            logprobs, choice.offset = self._names.completion(entries, choice.offset)
        return {"text": text, "logprobs": logprobs}


class _Chat(Generation[ChatBody]):
    prefix, kind, chunk = "chatcmpl", "chat.completion", ".chunk"

    def _said(self, news: _News) -> dict[str, Any]:
        text, calls = news.text, news.calls
        thought = news.thought if self.body.include_reasoning else ""
        logprobs = self._names.chat(news.logprobs) if self.body.logprobs else None
        if self.body.stream:
            delta: dict[str, Any] = {"role": "assistant"} if news.first else {}
            if thought:
                delta["reasoning_content"] = thought
            if news.first or text:
                delta["content"] = text
            if calls:
                before = len(self.choices[news.index].calls) - len(calls)
                delta["tool_calls"] = tool_calls(calls, before, indexed=True)
            return {"delta": delta, "logprobs": logprobs}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            listed = tool_calls(calls, indexed=False)
            message |= {"content": text.strip() or None, "tool_calls": listed}
        return {"message": message, "logprobs": logprobs}


class Generations:
    """The two routes."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._hub: Hub | None = None

    async def completions(
        self, service: Service, request: Request, body: CompletionBody
    ) -> Response:
        """POST /v1/completions."""
        _, scheduler = service.ready()
        latencies = self._metrics.of(service.settings.name)
        with scheduler.places(prepare.choices(service, body)):
            prepared = await asyncio.to_thread(prepare.completions, service, body)
            found = _Completion(service, self._here(), latencies, body, prepared)
            found.submit(scheduler)
        return await found.answer(request)

    async def chat(self, service: Service, request: Request, body: ChatBody) -> Response:
        """POST /v1/chat/completions."""
        _, scheduler = service.ready()
        latencies = self._metrics.of(service.settings.name)
        with scheduler.places(prepare.choices(service, body)):
            prepared = await asyncio.to_thread(prepare.chat, service, body)
            found = _Chat(service, self._here(), latencies, body, prepared)
            found.submit(scheduler)
        return await found.answer(request)

    def _here(self) -> Hub:
        if self._hub is None:  # the loop runs now
            self._hub = Hub()
        return self._hub
