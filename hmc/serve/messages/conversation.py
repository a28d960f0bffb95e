"""From a body of Anthropic's to the chat that it stands for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

from hmc.serve.bodies import CalledFunction, ChatBody, Message, ToolCall
from hmc.serve.extras import as_chat
from hmc.serve.faults import bad_request
from hmc.serve.messages.body import (
    CountBody,
    MessagesBody,
    RedactedBlock,
    TextBlock,
    ThinkingBlock,
    ToolResultBlock,
    ToolUseBlock,
    Turn,
)
from hmc.serve.sealed import opened

_WHOSE = {"tool_result": "user", "tool_use": "assistant", "thinking": "assistant"}
_WHOSE |= {"redacted_thinking": "assistant"}


def chat_of(body: CountBody | MessagesBody) -> ChatBody:
    """The chat; raises `ApiError` naming what does not fit together."""
    fields: dict[str, Any] = {"model": body.model, "messages": list(_messages(body))}
    last = body.messages[-1]
    if last.role == "assistant":
        if any(isinstance(block, ToolUseBlock) for block in last.content):
            raise bad_request("messages: the last one calls a tool: its tool_result is missing")
        fields["continue_final_message"] = True
    if isinstance(body, MessagesBody):
        fields |= {"max_tokens": body.max_tokens, "stop": body.stop_sequences}
    return as_chat(body, **fields, **_tools(body), **_manner(body))


def _tools(body: CountBody) -> dict[str, Any]:
    """The tools, and which of them have to be called."""
    tools = [
        {
            "type": "function",
            "function": {
                "name": tool.name,
                "description": tool.description,
                "parameters": tool.input_schema,
                "strict": tool.strict,
            },
        }
        for tool in body.tools
    ]
    choice = body.tool_choice
    if choice is None:
        return {"tools": tools}
    if (choice.type == "tool") != (choice.name is not None):
        raise bad_request("tool_choice: a name goes with type 'tool', and no other", "tool_choice")
    named = choice.type == "tool"
    return {
        "tools": tools,
        "tool_choice": {"type": "tool", "name": choice.name} if named else choice.type,
        "parallel_tool_calls": not choice.disable_parallel_tool_use,
    }


def _manner(body: CountBody) -> dict[str, Any]:
    """How the answer is thought about and written."""
    config = body.output_config
    effort = config.effort if config else None
    form = (config.format if config else None) or body.output_format
    variables = dict(body.chat_template_kwargs)
    if body.thinking is not None:
        variables.setdefault("enable_thinking", body.thinking.type != "disabled")
    schema = None if form is None else {"name": "answer", "schema": form.schema_}
    return {
        "chat_template_kwargs": variables,
        "reasoning_effort": effort,
        "response_format": schema and {"type": "json_schema", "json_schema": schema},
    }


def _messages(body: CountBody) -> Iterator[Message]:
    if body.system:
        yield Message(role="system", content=_text(body.system))
    for number, turn in enumerate(body.messages):
        if isinstance(turn.content, str):
            yield Message(role=turn.role, content=turn.content)
            continue
        if not turn.content:
            raise bad_request(f"messages.{number}.content: it is empty")
        for block in turn.content:
            if _WHOSE.get(block.type, turn.role) != turn.role:
                place = f"messages.{number}.content"
                raise bad_request(f"{place}: a {block.type} in a message of the {turn.role}", place)
        yield from (_answer(turn),) if turn.role == "assistant" else _question(turn)


def _answer(turn: Turn) -> Message:
    """An assistant's message."""
    thoughts, texts, calls = list[str](), list[str](), list[ToolCall]()
    for block in turn.content:
        if isinstance(block, ThinkingBlock):
            thoughts.append(block.thinking or opened(block.signature))
        elif isinstance(block, RedactedBlock):
            thoughts.append(opened(block.data))
        elif isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolUseBlock):
            called = CalledFunction(name=block.name, arguments=_arguments(block.input))
            calls.append(ToolCall(id=block.id, function=called))
    thought = "\n\n".join(filter(None, thoughts)) or None
    return Message(
        role="assistant", content="".join(texts), reasoning_content=thought, tool_calls=calls
    )


def _question(turn: Turn) -> Iterator[Message]:
    """A user's message: results of tools, each a message of its own, and text, in their order."""
    texts = list[str]()
    for block in turn.content:
        if isinstance(block, TextBlock):
            texts.append(block.text)
        elif isinstance(block, ToolResultBlock):
            if texts:
                yield Message(role=turn.role, content="".join(texts))
                texts = []
            told = _text(block.content)
            content = f"Error: {told}" if block.is_error else told
            yield Message(role="tool", content=content, tool_call_id=block.tool_use_id)
    if texts:
        yield Message(role=turn.role, content="".join(texts))


def _arguments(given: Any) -> Any:
    return given if isinstance(given, dict) else json.dumps(given, ensure_ascii=False)


def _text(given: str | Sequence[TextBlock]) -> str:
    return given if isinstance(given, str) else "".join(block.text for block in given)
