"""Answers and events in the words of the Responses interface."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator, Sequence
from typing import Any

from hmc.serve.faults import ApiError
from hmc.serve.generate import Answering, News
from hmc.serve.parts import Parts, Step
from hmc.serve.responses.body import ResponsesBody
from hmc.serve.responses.items import content, item, item_id, response
from hmc.serve.writing import Event, Writer


class ResponsesWriter(Writer):
    """Of /v1/responses."""

    named = True

    def __init__(self, answering: Answering, body: ResponsesBody, model: str) -> None:
        super().__init__(answering, f"resp_{uuid.uuid4().hex}", stream=body.stream)
        self._body = body
        self._head = {
            "id": self.id,
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
        }
        self._sealed = "reasoning.encrypted_content" in body.include
        self._parts = Parts(calls=answering.prepared.tools is not None)
        self._count = 0

    def begin(self) -> Iterator[Event]:
        """The response without output."""
        yield self._event("response.created", response=self._response(status="in_progress"))
        yield self._event("response.in_progress", response=self._response(status="in_progress"))

    def said(self, news: News) -> Iterator[Event]:
        """Items that begin, say more and end."""
        for step in self._parts.take(news):
            yield from self._events(step)

    def end(self) -> Iterator[Event]:
        """The whole response."""
        found = self._ended(self.answering.choices[0].reason)
        yield self._event(f"response.{found['status']}", response=found)

    def failed(self, fault: ApiError) -> Iterator[Event]:
        """What there is, with the error."""
        error = {"code": "server_error", "message": fault.message}
        yield self._event("response.failed", response=self._response(status="failed", error=error))

    def whole(self, told: Sequence[News]) -> dict[str, Any]:
        """The response."""
        (news,) = told
        for _ in self._parts.take(news):
            pass
        return self._ended(news.reason)

    def _ended(self, reason: str | None) -> dict[str, Any]:
        state: dict[str, Any] = {"status": "completed", "completed_at": int(time.time())}
        if reason == "length":
            details = {"reason": "max_output_tokens"}
            state = {"status": "incomplete", "incomplete_details": details}
        return self._response(usage=self._usage(), **state)

    def _response(self, **state: Any) -> dict[str, Any]:
        output = [item(part, sealed=self._sealed) for part in self._parts.all]
        return response(self._body, self._head, output, **state)

    def _usage(self) -> dict[str, Any]:
        prompt, new = self.answering.prompt_tokens, self.answering.new_tokens
        thought = sum(choice.thought_tokens for choice in self.answering.choices)
        cached = self.answering.cached_tokens
        return {
            "input_tokens": prompt,
            "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
            "output_tokens": new,
            "output_tokens_details": {"reasoning_tokens": thought},
            "total_tokens": prompt + new,
        }

    def _event(self, kind: str, **fields: Any) -> dict[str, Any]:
        self._count += 1
        return {"type": kind, "sequence_number": self._count - 1, **fields}

    def _events(self, step: Step) -> Iterator[dict[str, Any]]:
        part, kind = step.part, step.part.kind
        where: dict[str, Any] = {"item_id": item_id(part), "output_index": part.number}
        within = {**where, "content_index": 0}
        index = {"output_index": part.number}
        word = "output_text" if kind == "text" else "reasoning_text"
        none: dict[str, Any] = {"logprobs": []} if kind == "text" else {}
        if step.what == "begins":
            begun = item(part, empty=True)
            yield self._event("response.output_item.added", **index, item=begun)
            if kind != "call":
                bare = content(part, empty=True)
                yield self._event("response.content_part.added", **within, part=bare)
        elif kind == "call" and step.what == "more":
            yield self._event("response.function_call_arguments.delta", **where, delta=step.text)
        elif step.what == "more":
            yield self._event(f"response.{word}.delta", **within, delta=step.text, **none)
        else:
            if kind == "call":
                whole = {"name": part.name, "arguments": part.text}
                yield self._event("response.function_call_arguments.done", **where, **whole)
            else:
                yield self._event(f"response.{word}.done", **within, text=part.text, **none)
                yield self._event("response.content_part.done", **within, part=content(part))
            ended = item(part, sealed=self._sealed)
            yield self._event("response.output_item.done", **index, item=ended)
