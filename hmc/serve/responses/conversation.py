"""From a body of the Responses interface to the chat that it stands for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from hmc.serve.bodies import CalledFunction, ChatBody, Message, ToolCall
from hmc.serve.extras import as_chat
from hmc.serve.faults import ApiError, bad_request
from hmc.serve.responses.body import (
    Format,
    FunctionCall,
    FunctionOutput,
    InputMessage,
    InputText,
    ReasoningItem,
    ResponsesBody,
)
from hmc.serve.sealed import opened

_NAMES = {"max_tokens": "max_output_tokens", "messages": "input", "response_format": "text.format"}


def chat_of(body: ResponsesBody) -> ChatBody:
    """The chat; raises `ApiError` naming what does not fit together."""
    if body.stream_options is not None and not body.stream:
        raise bad_request("stream_options needs stream", "stream_options")
    tools = [
        {"type": "function", "function": tool.model_dump(exclude={"type"})} for tool in body.tools
    ]
    return as_chat(
        body,
        model=body.model,
        messages=list(_messages(body)),
        tools=tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls,
        max_tokens=body.max_output_tokens,
        reasoning_effort=body.reasoning.effort,
        response_format=_format(body.text.format),
    )


def in_its_words(fault: ApiError) -> ApiError:
    """A chat's error, with the field's name in this interface."""
    fault.param = _NAMES.get(fault.param or "", fault.param)
    return fault


def _format(form: Format) -> dict[str, Any] | None:
    if form.type != "json_schema":
        return {"type": form.type}
    if form.schema_ is None:
        place = "text.format.schema"
        raise bad_request(f"{place} is missing", place)
    return {"type": form.type, "json_schema": {"name": form.name, "schema": form.schema_}}


def _messages(body: ResponsesBody) -> Iterator[Message]:
    """Messages; a thought, a text and calls that follow each other are one of the assistant's."""
    if body.instructions:
        yield Message(role="system", content=body.instructions)
    if isinstance(body.input, str):
        yield Message(role="user", content=body.input)
        return
    answer: Message | None = None
    for item in body.input:
        own = isinstance(item, FunctionCall | ReasoningItem) or (
            isinstance(item, InputMessage) and item.role == "assistant"
        )
        if answer is not None and not (own and _goes_on(answer, item)):
            yield answer
            answer = None
        if own:
            answer = answer or Message(role="assistant")
            _add(answer, item)
        elif isinstance(item, InputMessage):
            yield Message(role=item.role, content=_text(item.content))
        elif isinstance(item, FunctionOutput):
            yield Message(role="tool", content=_text(item.output), tool_call_id=item.call_id)
    if answer is not None:
        yield answer


def _goes_on(answer: Message, item: Any) -> bool:
    """Whether an item is of the same answer: a call always, a text before calls, no other thought
    than the first.
    """
    if isinstance(item, InputMessage):
        return answer.content is None and not answer.tool_calls
    return isinstance(item, FunctionCall)


def _add(answer: Message, item: Any) -> None:
    if isinstance(item, InputMessage):
        answer.content = _text(item.content)
    elif isinstance(item, FunctionCall):
        function = CalledFunction(name=item.name, arguments=item.arguments)
        call = ToolCall(id=item.call_id, function=function)
        answer.tool_calls = [*(answer.tool_calls or ()), call]
    elif isinstance(item, ReasoningItem):
        said = "".join(part.text for part in item.content) or opened(item.encrypted_content)
        said = said or "\n\n".join(part.text for part in item.summary)
        answer.reasoning_content = said or None


def _text(given: str | Sequence[InputText]) -> str:
    return given if isinstance(given, str) else "".join(part.text for part in given)
