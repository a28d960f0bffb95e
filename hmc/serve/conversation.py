"""From the messages of a body to a prompt in the model's chat form."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

from hmc.runtime.tokens.text import Text
from hmc.serve.bodies import Conversation, Message, NamedChoice, ToolCall
from hmc.serve.faults import bad_request
from hmc.serve.service import Service

_OURS = ("messages", "tools", "add_generation_prompt", "continue_final_message")


def encoded(service: Service, text: Text, body: Conversation) -> list[int]:
    """Token ids of a conversation with the tools that it offers, ready to be answered."""
    tools, _ = offered(body)
    proceeds = body.continue_final_message
    if proceeds and body.add_generation_prompt:
        raise bad_request(
            "continue_final_message goes on with the last message, add_generation_prompt begins"
            " another: give one of them",
            "continue_final_message",
        )
    if proceeds and (body.messages[-1].role != "assistant" or body.messages[-1].tool_calls):
        raise bad_request(
            "continue_final_message: the last message must be the assistant's, without tool calls",
            "continue_final_message",
        )
    return text.encode_chat(
        messages(service, body.messages),
        tools=tools or None,
        add_generation_prompt=body.add_generation_prompt is not False,
        continue_final_message=proceeds,
        variables=_variables(body),
    )


def offered(body: Conversation) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The tools offered, and those of which one has to be called."""
    tools = [tool.model_dump(exclude_none=True) for tool in body.tools]
    choice = body.tool_choice
    if choice == "required" and not tools:
        raise bad_request("tool_choice needs tools", "tool_choice")
    if choice == "none":
        return [], []
    if isinstance(choice, NamedChoice):
        name = choice.function.name
        chosen = [tool for tool in tools if tool["function"]["name"] == name]
        if not chosen:
            raise bad_request(f"tool_choice: no tool is named {name!r}", "tool_choice")
        return tools, chosen
    return tools, tools if choice == "required" else []


def messages(service: Service, given: Sequence[Message]) -> list[dict[str, Any]]:
    """Messages as the model's chat template wants them: content as text, arguments of calls in its
    form.
    """
    result = []
    for message in given:
        content = message.content
        if content is None and message.role != "assistant":
            raise bad_request(f"messages: a message of the {message.role} without content")
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        entry = message.model_dump(include={"name", "tool_call_id"}, exclude_none=True)
        entry["role"] = "system" if message.role == "developer" else message.role
        entry["content"] = content or ""
        if thought := message.reasoning_content or message.reasoning:
            entry["reasoning_content"] = entry["reasoning"] = entry["thinking"] = thought
        if message.tool_calls:
            entry["tool_calls"] = [_called(service, call) for call in message.tool_calls]
        result.append(entry)
    return result


def _variables(body: Conversation) -> dict[str, Any]:
    """What the template is told besides messages and tools."""
    if wrong := next((name for name in _OURS if name in body.chat_template_kwargs), ""):
        place = f"chat_template_kwargs.{wrong}"
        raise bad_request(f"{place}: it is no argument of templates: say it in the body", place)
    found: dict[str, Any] = {}
    if body.documents is not None:
        found["documents"] = body.documents
    if body.reasoning_effort is not None:
        found["reasoning_effort"] = body.reasoning_effort
        found["enable_thinking"] = body.reasoning_effort != "none"
    return found | body.chat_template_kwargs


def _called(service: Service, call: ToolCall) -> dict[str, Any]:
    """A call of the history; arguments that are no JSON are put before the model as they are."""
    found, arguments = call.model_dump(), call.function.arguments
    as_text = service.form().arguments_as_text
    if as_text and isinstance(arguments, dict):
        arguments = json.dumps(arguments, ensure_ascii=False)
    elif not as_text and isinstance(arguments, str):
        with suppress(ValueError, RecursionError):
            arguments = json.loads(arguments or "{}")
    found["function"]["arguments"] = arguments
    return found
