"""/v1/completions and /v1/chat/completions: whole answers and streams of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
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
                if update.finish_reason is not None and index % self._each == 0:
                    self._cached += update.cached_tokens
                yield index, update, *choice.take(update)
        finally:
            self.replies.cancel()

    def usage(self) -> dict[str, Any]:
        """Tokens counted so far; each prompt once."""
        new = sum(len(choice.tokens) for choice in self.choices)
        return usage(self.prepared.prompt_tokens, new, self._cached)

    @property
    def _each(self) -> int:
        return self.prepared.choices_per_prompt


class Generations:
    """The two routes."""

    def __init__(self, service: Service, metrics: Metrics) -> None:
        self._service, self._metrics = service, metrics
        self._hub: Hub | None = None

    async def completions(self, request: Request, body: CompletionBody) -> Response:
        """POST /v1/completions."""
        prepared = await asyncio.to_thread(prepare.completions, self._service, body)
        generation = self._generation(prepared)
        head = Head("cmpl", "text_completion", self._service.settings.name)
        for index, choice in enumerate(generation.choices):
            if body.echo:
                choice.text = self._echoed(body, prepared, index)
        generation.submit()
        if body.stream:
            return self._stream(generation, _completion_chunks(generation, head, body))
        await _all(request, generation)
        parts = []
        for index, choice in enumerate(generation.choices):
            entries = _echo_entries(choice, prepared, index, body.echo) + choice.logprobs
            part: dict[str, Any] = {
                "index": index,
                "text": choice.text,
                "logprobs": None,
                "finish_reason": choice.reason,
            }
            if body.logprobs is not None:
                part["logprobs"], _ = generation.names.completion(entries, 0)
            if body.return_token_ids:
                part["token_ids"] = choice.tokens
            parts.append(part)
        return JSONResponse(head.part(parts, usage=generation.usage()))

    async def chat(self, request: Request, body: ChatBody) -> Response:
        """POST /v1/chat/completions."""
        prepared = await asyncio.to_thread(prepare.chat, self._service, body)
        generation = self._generation(prepared)
        kind = "chat.completion.chunk" if body.stream else "chat.completion"
        head = Head("chatcmpl", kind, self._service.settings.name)
        generation.submit()
        if body.stream:
            return self._stream(generation, _chat_chunks(generation, head, body))
        await _all(request, generation)
        parts = []
        for index, choice in enumerate(generation.choices):
            calls = tool_calls(choice.calls, indexed=False)
            content = choice.text.strip() if calls else choice.text
            message: dict[str, Any] = {"role": "assistant", "content": content, "refusal": None}
            if calls:
                message |= {"content": content or None, "tool_calls": calls}
            part = {
                "index": index,
                "message": message,
                "logprobs": generation.names.chat(choice.logprobs) if body.logprobs else None,
                "finish_reason": choice.reason,
            }
            if body.return_token_ids:
                part["token_ids"] = choice.tokens
            parts.append(part)
        return JSONResponse(head.part(parts, usage=generation.usage()))

    def _generation(self, prepared: Prepared) -> Generation:
        if self._hub is None:  # the loop runs now
            self._hub = Hub()
        names = Names(self._service.vocabulary)
        return Generation(self._service, self._hub, self._metrics, prepared, names)

    def _stream(
        self, generation: Generation, chunks: AsyncGenerator[dict[str, Any] | str, None]
    ) -> Response:
        return EventStream(
            chunks,
            keep_alive=self._service.settings.keep_alive_seconds,
            gone=generation.replies.cancel,
        )

    def _echoed(self, body: CompletionBody, prepared: Prepared, index: int) -> str:
        engine, _ = self._service.ready()
        if isinstance(body.prompt, str):
            return body.prompt
        given = body.prompt[index // body.n]
        if isinstance(given, str):
            return given
        return engine.text.decode(prepared.requests[index].ids.tolist()) if engine.text else ""


async def _all(request: Request, generation: Generation) -> None:
    """Wait for every choice; a client that hangs up cancels them."""
    async with watched(request.receive, generation.replies.cancel):
        async for _ in generation.updates():
            pass


async def _completion_chunks(
    generation: Generation, head: Head, body: CompletionBody
) -> AsyncGenerator[dict[str, Any] | str, None]:
    updates = generation.updates()
    try:
        async for index, update, text, _ in updates:
            choice = generation.choices[index]
            entries: list[TokenLogprob | int] = list(update.logprobs)
            if not choice.begun:
                choice.begun = True
                if body.echo:
                    text = choice.text
                    entries = [*_echo_entries(choice, generation.prepared, index, True), *entries]
            elif not text and choice.reason is None and not _wants_all(body):
                continue
            part = {"index": index, "text": text, "logprobs": None, "finish_reason": choice.reason}
            if body.logprobs is not None:
                found, choice.offset = generation.names.completion(entries, choice.offset)
                part["logprobs"] = found
            if body.return_token_ids:
                part["token_ids"] = list(update.token_ids)
            yield head.part([part])
    except HmcError as error:
        yield of_error(error).body()
        return
    finally:
        await updates.aclose()
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.part([], usage=generation.usage())
    yield "[DONE]"


async def _chat_chunks(
    generation: Generation, head: Head, body: ChatBody
) -> AsyncGenerator[dict[str, Any] | str, None]:
    updates = generation.updates()
    try:
        async for index, update, text, calls in updates:
            choice = generation.choices[index]
            delta: dict[str, Any] = {"content": text} if text else {}
            if not choice.begun:
                choice.begun = True
                delta = {"role": "assistant", "content": text}
            if calls:
                first = len(choice.calls) - len(calls)
                delta["tool_calls"] = tool_calls(calls, first, indexed=True)
            if not delta and choice.reason is None and not _wants_all(body):
                continue
            part = {"index": index, "delta": delta, "finish_reason": choice.reason}
            part["logprobs"] = generation.names.chat(update.logprobs) if body.logprobs else None
            if body.return_token_ids:
                part["token_ids"] = list(update.token_ids)
            yield head.part([part])
    except HmcError as error:
        yield of_error(error).body()
        return
    finally:
        await updates.aclose()
    if body.stream_options is not None and body.stream_options.include_usage:
        yield head.part([], usage=generation.usage())
    yield "[DONE]"


def _wants_all(body: CompletionBody | ChatBody) -> bool:
    """Whether an update without text is told too: it has something else to tell."""
    return body.return_token_ids or body.logprobs not in (None, False)


def _echo_entries(
    choice: _Choice, prepared: Prepared, index: int, echo: bool
) -> list[TokenLogprob | int]:
    """The prompt's log-probabilities, the first token's id in front."""
    if not echo or choice.scored is None:
        return []
    return [int(prepared.requests[index].ids[0]), *choice.scored]
