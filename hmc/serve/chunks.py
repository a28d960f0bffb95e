"""/v1/completions and /v1/chat/completions: answers and chunks in OpenAI's words."""

from __future__ import annotations

import time
import uuid
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Generic, TypeVar

from hmc.runtime.tokens.requests import TokenLogprob
from hmc.runtime.tokens.text import Text
from hmc.serve.answers import Names, tool_calls
from hmc.serve.bodies import ChatBody, CompletionBody, StreamOptions
from hmc.serve.faults import ApiError
from hmc.serve.generate import Answering, News
from hmc.serve.writing import Event, Writer

Asked = TypeVar("Asked", bound=CompletionBody | ChatBody)


class _Chunks(Writer, Generic[Asked]):
    """What completions and chats share. `prefix` is what ids of answers begin with, `kind` what
    OpenAI calls them, with `chunk` when they stream.
    """

    prefix: ClassVar[str]
    kind: ClassVar[str]
    chunk: ClassVar[str] = ""

    def __init__(self, answering: Answering, body: Asked, model: str, names: Names) -> None:
        super().__init__(answering, f"{self.prefix}-{uuid.uuid4().hex}", stream=body.stream)
        self.body, self._names = body, names
        self._options = body.stream_options or StreamOptions()
        self._head = {
            "id": self.id,
            "object": self.kind + (self.chunk if body.stream else ""),
            "created": int(time.time()),
            "model": model,
        }

    @abstractmethod
    def _part(self, news: News) -> dict[str, Any]:
        """What an answer says of a choice."""

    def said(self, news: News) -> Iterable[Event]:
        """A chunk, where there is anything to say."""
        wants_all = self.body.return_token_ids or self.body.logprobs not in (None, False)
        heard = news.thought or news.text or news.calls or news.reason is not None
        if not (news.first or heard or wants_all):
            return ()
        usage = {"usage": self._usage()} if self._options.continuous_usage_stats else {}
        return [{**self._head, "choices": [self._choice(news)], **usage}]

    def end(self) -> Iterable[Event]:
        """The usage where it is asked for, and OpenAI's last line."""
        if self._options.include_usage:
            yield {**self._head, "choices": [], "usage": self._usage()}
        yield "[DONE]"

    def failed(self, fault: ApiError) -> Iterable[Event]:
        """The error alone."""
        return [fault.body()]

    def whole(self, told: Sequence[News]) -> dict[str, Any]:
        """Every choice."""
        return {**self._head, "choices": [self._choice(n) for n in told], "usage": self._usage()}

    def _choice(self, news: News) -> dict[str, Any]:
        part = {"index": news.index, **self._part(news), "finish_reason": news.reason}
        return part | {"token_ids": list(news.tokens)} if self.body.return_token_ids else part

    def _usage(self) -> dict[str, Any]:
        """Tokens counted so far; each prompt once."""
        prompt, new = self.answering.prompt_tokens, self.answering.new_tokens
        return {
            "prompt_tokens": prompt,
            "completion_tokens": new,
            "total_tokens": prompt + new,
            "prompt_tokens_details": {"cached_tokens": self.answering.cached_tokens},
        }


class CompletionChunks(_Chunks[CompletionBody]):
    """Of /v1/completions."""

    prefix, kind = "cmpl", "text_completion"

    def __init__(
        self,
        answering: Answering,
        body: CompletionBody,
        model: str,
        names: Names,
        text: Text | None,
    ) -> None:
        """`text` turns prompts that are ids into text, to be echoed."""
        super().__init__(answering, body, model, names)
        self._text = text
        openings = [self._opening(index) for index in range(len(answering.choices))]
        self._offsets = [0] * len(openings)
        for choice, opening in zip(answering.choices, openings, strict=True):
            choice.text = opening

    def _opening(self, index: int) -> str:
        """What the text of a choice begins with."""
        prompt = self.body.prompt
        given = prompt if isinstance(prompt, str) else prompt[index // self.body.n]
        if not self.body.echo:
            return ""
        if isinstance(given, str):
            return given
        ids = self.answering.prepared.requests[index].ids
        return self._text.decode(ids.tolist()) if self._text else ""

    def _part(self, news: News) -> dict[str, Any]:
        choice = self.answering.choices[news.index]
        text, entries = news.text, list[TokenLogprob | int](news.logprobs)
        if news.first and self.body.echo:
            text = choice.text
            if choice.scored is not None:  # the first token has no log-probability
                given = int(self.answering.prepared.requests[news.index].ids[0])
                entries = [given, *choice.scored, *entries]
        logprobs = None
        if self.body.logprobs is not None:
            at = self._offsets[news.index]
            logprobs, self._offsets[news.index] = self._names.completion(entries, at)
        return {"text": text, "logprobs": logprobs}


class ChatChunks(_Chunks[ChatBody]):
    """Of /v1/chat/completions."""

    prefix, kind, chunk = "chatcmpl", "chat.completion", ".chunk"

    def _part(self, news: News) -> dict[str, Any]:
        text, calls = news.text, news.calls
        thought = news.thought if self.body.include_reasoning else ""
        logprobs = self._names.chat(news.logprobs) if self.body.logprobs else None
        if self.stream:
            delta: dict[str, Any] = {"role": "assistant"} if news.first else {}
            if thought:
                delta["reasoning_content"] = thought
            if news.first or text:
                delta["content"] = text
            if calls:
                before = len(self.answering.choices[news.index].calls) - len(calls)
                delta["tool_calls"] = tool_calls(calls, before, indexed=True)
            return {"delta": delta, "logprobs": logprobs}
        message: dict[str, Any] = {"role": "assistant", "content": text, "refusal": None}
        if thought:
            message["reasoning_content"] = thought
        if calls:
            listed = tool_calls(calls, indexed=False)
            message |= {"content": text.strip() or None, "tool_calls": listed}
        return {"message": message, "logprobs": logprobs}
