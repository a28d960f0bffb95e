"""What a response consists of: the object that answers and events have, its items, their parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from hmc.serve.bodies import NamedChoice
from hmc.serve.parts import Part
from hmc.serve.responses.body import ResponsesBody
from hmc.serve.sealed import seal

_PREFIX = {"thought": "rs", "text": "msg", "call": "fc"}


def item_id(part: Part) -> str:
    """The id of a part's item."""
    return f"{_PREFIX[part.kind]}_{part.id}"


def item(part: Part, *, empty: bool = False, sealed: bool = False) -> dict[str, Any]:
    """A part as an item of the output; as streams begin it if `empty`. `sealed`: a thought comes
    once more as what a client carries.
    """
    status = "in_progress" if empty else "incomplete" if part.cut else "completed"
    head: dict[str, Any] = {"id": item_id(part), "status": status}
    if part.kind == "call":
        called = {"call_id": f"call_{part.id}", "name": part.name}
        return {**head, "type": "function_call", **called, "arguments": "" if empty else part.text}
    said = [] if empty else [content(part)]
    if part.kind == "text":
        return {**head, "type": "message", "role": "assistant", "content": said}
    carried = seal(part.text) if sealed and not empty else None
    thought = {"type": "reasoning", "summary": [], "content": said, "encrypted_content": carried}
    return {**head, **thought}


def content(part: Part, *, empty: bool = False) -> dict[str, Any]:
    """The one part of content that a text or a thought has."""
    text = "" if empty else part.text
    if part.kind == "thought":
        return {"type": "reasoning_text", "text": text}
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def response(
    body: ResponsesBody,
    head: dict[str, Any],
    output: Sequence[dict[str, Any]],
    **state: Any,
) -> dict[str, Any]:
    """A response: `head` says which, `state` how far it is (status, usage, error and so on), all
    else what was asked for.
    """
    choice: Any = body.tool_choice or "auto"
    if isinstance(choice, NamedChoice):
        choice = {"type": "function", "name": choice.function.name}
    tools = [tool.model_dump() for tool in body.tools]
    form = body.text.format.model_dump(by_alias=True, exclude_unset=True)
    return {
        **head,
        "status": None,
        "error": None,
        "incomplete_details": None,
        "output": list(output),
        "usage": None,
        **state,
        "instructions": body.instructions,
        "metadata": body.metadata,
        "tools": tools,
        "tool_choice": choice,
        "parallel_tool_calls": body.parallel_tool_calls,
        "max_output_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_logprobs": 0,
        "reasoning": body.reasoning.model_dump(),
        "text": {"format": form, "verbosity": body.text.verbosity},
        "truncation": "disabled",
        "background": False,
        "store": False,
        "previous_response_id": None,
    }
