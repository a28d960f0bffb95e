"""The Responses interface, by the official `openai` client against a live server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest
from reading import prompt_of

from hmc.serve.responses.body import ResponsesBody
from hmc.serve.responses.conversation import chat_of
from hmc.serve.sealed import opened, seal

ASK: Any = [{"role": "user", "content": "Who is the Lord?"}]
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Zion", "Tyre"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [{"type": "function", "name": "weather", "parameters": WEATHER, "strict": True}]
THOUGHT = {"regex": "<think>\n[a-z]{3,9} [a-z]{2,8}\n</think>\n\n[A-Z][a-z]{2,12}"}
SEALED: Any = ["reasoning.encrypted_content"]


def _answer(client: openai.OpenAI, stream: bool, **asked: Any) -> Any:
    """A response, whole or as its last event has it."""
    arguments: Any = {"model": "tiny", "max_output_tokens": 60, "temperature": 0, **asked}
    if not stream:
        return client.responses.create(**arguments)
    with client.responses.stream(**arguments) as events:
        seen = list(events)
    assert [event.sequence_number for event in seen] == list(range(len(seen)))
    assert [event.type for event in seen[:2]] == ["response.created", "response.in_progress"]
    return seen[-1].response


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_tools_and_reasoning_sent_back_verbatim(
    client: openai.OpenAI, live: Any, stream: bool
) -> None:
    history = list(ASK)

    def turn(**more: Any) -> Any:
        found = _answer(client, stream, input=history, instructions="Be brief.", **more)
        history.extend(item.model_dump() for item in found.output)
        return found

    first = turn(tools=TOOLS, tool_choice="required", parallel_tool_calls=False)
    assert (first.status, first.store) == ("completed", False)
    (call,) = first.output
    assert call.name == "weather" and json.loads(call.arguments)["city"] in ("Zion", "Tyre")
    history.append({"type": "function_call_output", "call_id": call.call_id, "output": "rain"})

    thought = {"structured_outputs": THOUGHT}
    second = turn(tools=TOOLS, extra_body=thought, metadata={"a": "b"}, include=SEALED)
    reasoning, message = second.output
    said = reasoning.content[0].text
    assert " " in said and opened(reasoning.encrypted_content) == said
    assert message.content[0].text == second.output_text and second.output_text.isalpha()
    assert (second.status, second.metadata) == ("completed", {"a": "b"})
    assert 0 < second.usage.output_tokens_details.reasoning_tokens < second.usage.output_tokens
    history[-2]["content"] = None  # as clients do that carry what is sealed
    history.append({"role": "user", "content": [{"type": "input_text", "text": "And then?"}]})

    third = turn(reasoning={"effort": "high"}, extra_body={"ignore_eos": True})
    assert (third.status, third.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    (cut,) = third.output
    assert (cut.type, cut.status) == ("reasoning", "incomplete")
    history.append({"role": "user", "content": "So?"})

    assert turn(tools=TOOLS, tool_choice="none").output_text

    asked = {"input": history[:-1], "instructions": "Be brief.", "tools": TOOLS}
    prompt, _ = prompt_of(live.url, chat_of(ResponsesBody.model_validate(asked)))
    assert f'"arguments": {json.dumps(json.loads(call.arguments))}' in prompt
    assert f"<think>{said}</think>{second.output_text}" in prompt
    assert f"<think>{cut.content[0].text}</think>" in prompt and "Be brief." in prompt


def test_what_streams_are_made_of(client: openai.OpenAI) -> None:
    arguments: Any = {"model": "tiny", "max_output_tokens": 100, "input": "Who?", "stream": True}
    arguments["temperature"] = 0
    events = list(client.responses.create(**arguments, extra_body={"structured_outputs": THOUGHT}))
    kinds = [event.type.removeprefix("response.") for event in events]
    once = [kind for at, kind in enumerate(kinds) if at == 0 or kinds[at - 1] != kind]
    part = ["output_item.added", "content_part.added"], ["content_part.done", "output_item.done"]
    assert once == [
        *("created", "in_progress"),
        *(*part[0], "reasoning_text.delta", "reasoning_text.done", *part[1]),
        *(*part[0], "output_text.delta", "output_text.done", *part[1]),
        "completed",
    ]
    for kind, item in zip(
        ("reasoning_text", "output_text"), events[-1].response.output, strict=True
    ):
        text = item.content[0].text
        told = [event for event in events if event.type.startswith(f"response.{kind}.")]
        assert "".join(event.delta for event in told[:-1]) == told[-1].text == text
        assert {event.item_id for event in told} == {item.id}
    choice: Any = {"type": "function", "name": "weather"}
    events = list(client.responses.create(**arguments, tools=TOOLS, tool_choice=choice))
    added, delta, done, ended = events[2:-1]
    assert (added.item.arguments, added.item.status) == ("", "in_progress")
    assert delta.delta == done.arguments == ended.item.arguments
    assert done.item_id == added.item.id and events[-1].response.tool_choice.name == "weather"


def test_the_form_of_the_text(client: openai.OpenAI) -> None:
    form: Any = {"type": "json_schema", "name": "w", "schema": WEATHER, "strict": True}
    for text in ({"format": form}, {"format": {"type": "json_object"}, "verbosity": "low"}):
        found = _answer(client, False, input="Who?", text=text, max_output_tokens=100)
        if found.status == "completed":
            assert isinstance(json.loads(found.output_text), dict)
        assert found.output_text.startswith("{")
        assert found.text.format.type == text["format"]["type"]
    assert found.text.verbosity == "low"


def test_errors_name_the_field(client: openai.OpenAI) -> None:
    for wrong, named in (
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"max_output_tokens": 5000}, "max_output_tokens"),
        ({"background": True}, "background"),
    ):
        with pytest.raises(openai.BadRequestError) as refused:
            client.responses.create(**{"model": "tiny", "input": "Who?", **wrong})
        assert refused.value.param == named
    with pytest.raises(openai.NotFoundError, match="no embedding models"):
        client.embeddings.create(model="tiny", input="x")


def test_items_that_belong_together_are_one_message() -> None:
    call = {"type": "function_call", "call_id": "1", "name": "ark", "arguments": "{}"}
    said = {"type": "message", "role": "assistant", "content": "I look."}
    summary = [{"type": "summary_text", "text": "short"}]
    thought = {"type": "reasoning", "id": "rs_1", "summary": summary}
    sealed = {"type": "reasoning", "encrypted_content": seal("long"), "summary": []}
    output = {"type": "function_call_output", "call_id": "1", "output": "300 cubits"}
    items = [*ASK, thought, said, call, call, output, sealed, said, thought, call]
    given = chat_of(ResponsesBody.model_validate({"input": items})).messages
    assert [
        (each.role, each.content, each.reasoning_content, len(each.tool_calls or ()))
        for each in given
    ] == [
        ("user", "Who is the Lord?", None, 0),
        ("assistant", "I look.", "short", 2),
        ("tool", "300 cubits", None, 0),
        ("assistant", "I look.", "long", 0),
        ("assistant", None, "short", 1),
    ]


def test_what_others_sealed_says_nothing() -> None:
    assert opened(seal("die Frage \u2026")) == "die Frage \u2026"
    assert opened(None) == opened("") == opened("gAAAAA") == opened("hmc1.?") == ""
    assert opened("hmc1.abc") == opened("hmc1._w==") == ""
