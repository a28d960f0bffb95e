"""Answers and events in Anthropic's words."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from hmc.serve.faults import ApiError
from hmc.serve.generate import Answering, News
from hmc.serve.messages import faults
from hmc.serve.messages.body import MessagesBody
from hmc.serve.parts import Part, Parts, Step
from hmc.serve.sealed import seal
from hmc.serve.writing import Event, Writer

_REASONS = {"tool_calls": "tool_use", "length": "max_tokens"}
_FULL = "model_context_window_exceeded"


class MessagesWriter(Writer):
    """Of /v1/messages."""

    named = True
    silence = 'event: ping\ndata: {"type": "ping"}\n\n'

    def __init__(self, answering: Answering, body: MessagesBody, model: str) -> None:
        super().__init__(answering, f"msg_{uuid.uuid4().hex}", stream=body.stream)
        self._model, self._most = model, body.max_tokens
        self._parts = Parts(calls=answering.prepared.tools is not None)
        self._omits = body.thinking is not None and body.thinking.display == "omitted"

    def begin(self) -> Iterator[Event]:
        """The message without content, and a sign of life."""
        yield {"type": "message_start", "message": self._message(None)}
        yield {"type": "ping"}

    def said(self, news: News) -> Iterator[Event]:
        """Blocks that begin, say more and end."""
        for step in self._parts.take(news):
            yield from self._events(step)

    def end(self) -> Iterator[Event]:
        """Why it ended."""
        delta = self._ending(self.answering.choices[0].reason)
        yield {"type": "message_delta", "delta": delta, "usage": self._usage()}
        yield {"type": "message_stop"}

    def failed(self, fault: ApiError) -> Iterator[Event]:
        """An error event."""
        yield faults.body(fault)

    def whole(self, told: Sequence[News]) -> dict[str, Any]:
        """The message."""
        (news,) = told
        for _ in self._parts.take(news):
            pass
        return self._message(news.reason)

    def _message(self, reason: str | None) -> dict[str, Any]:
        return {
            "id": self.id,
            "type": "message",
            "role": "assistant",
            "model": self._model,
            "content": [self._block(part) for part in self._parts.all],
            **self._ending(reason),
            "usage": self._usage(),
        }

    def _ending(self, reason: str | None) -> dict[str, Any]:
        stop = None if reason != "stop" else self.answering.stop_met(0)
        told = _REASONS.get(reason or "", "end_turn" if stop is None else "stop_sequence")
        if reason == "length" and self.answering.new_tokens < self._most:
            told = _FULL
        return {"stop_reason": reason and told, "stop_sequence": stop}

    def _usage(self) -> dict[str, Any]:
        """Tokens so far; those of the prompt that were known already are counted apart."""
        cached = self.answering.cached_tokens
        thought = sum(choice.thought_tokens for choice in self.answering.choices)
        return {
            "input_tokens": self.answering.prompt_tokens - cached,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": cached,
            "output_tokens": self.answering.new_tokens,
            "output_tokens_details": {"thinking_tokens": thought},
        }

    def _events(self, step: Step) -> Iterator[dict[str, Any]]:
        part, index = step.part, step.part.number
        if step.what == "begins":
            block = self._block(part, empty=True)
            yield {"type": "content_block_start", "index": index, "content_block": block}
        elif step.what == "more":
            if delta := self._delta(part, step.text):
                yield {"type": "content_block_delta", "index": index, "delta": delta}
        else:
            if part.kind == "thought":
                delta = {"type": "signature_delta", "signature": seal(part.text)}
                yield {"type": "content_block_delta", "index": index, "delta": delta}
            yield {"type": "content_block_stop", "index": index}

    def _delta(self, part: Part, text: str) -> dict[str, Any] | None:
        if part.kind == "text":
            return {"type": "text_delta", "text": text}
        if part.kind == "call":
            text = json.dumps(_input(part), ensure_ascii=False)
            return {"type": "input_json_delta", "partial_json": text}
        return None if self._omits else {"type": "thinking_delta", "thinking": text}

    def _block(self, part: Part, *, empty: bool = False) -> dict[str, Any]:
        """A block of content; as streams begin it if `empty`."""
        if part.kind == "text":
            return {"type": "text", "text": "" if empty else part.text}
        if part.kind == "call":
            given = {} if empty else _input(part)
            return {"type": "tool_use", "id": f"toolu_{part.id}", "name": part.name, "input": given}
        thought = "" if empty or self._omits else part.text
        return {
            "type": "thinking",
            "thinking": thought,
            "signature": "" if empty else seal(part.text),
        }


def _input(part: Part) -> Any:
    """A call's arguments, whatever JSON the model wrote; as a text where it is none."""
    try:
        return json.loads(part.text)
    except ValueError:
        return part.text
