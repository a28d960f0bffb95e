"""The official `anthropic` client against a live server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx
import pytest
from reading import prompt_of

from hmc.serve.messages.body import CountBody, MessagesBody
from hmc.serve.messages.conversation import chat_of
from hmc.serve.sealed import opened

ASK: Any = [{"role": "user", "content": "Who is the Lord?"}]
WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"enum": ["Zion", "Tyre"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"name": "weather", "description": "Tells it.", "input_schema": WEATHER},
    {"name": "ark", "input_schema": {"type": "object", "properties": {}}},
]
THOUGHT = {"regex": "<think>\n[a-z]{3,9} [a-z]{2,8}\n</think>\n\n[A-Z][a-z]{2,12}"}


@pytest.fixture
def claude(live: Any) -> Iterator[anthropic.Anthropic]:
    options: Any = {"api_key": "none", "max_retries": 0, "timeout": 60}
    with anthropic.Anthropic(base_url=live.url, **options) as client:
        yield client


def _answer(client: anthropic.Anthropic, stream: bool, **asked: Any) -> Any:
    """A message, whole or as the client's own stream puts it together."""
    more = {"temperature": 0, **asked.pop("extra_body", {})}  # later clients lack the field
    arguments: Any = {"model": "tiny", "max_tokens": 60, "extra_body": more, **asked}
    if not stream:
        return client.messages.create(**arguments)
    with client.messages.stream(**arguments) as events:
        kinds = [event.type for event in events]
        assert (kinds[0], kinds[-1]) == ("message_start", "message_stop")
        return events.get_final_message()


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_tools_and_thinking_sent_back_verbatim(
    claude: anthropic.Anthropic, live: Any, stream: bool
) -> None:
    history = list(ASK)

    def turn(**more: Any) -> Any:
        message = _answer(claude, stream, messages=history, system="Be brief.", **more)
        blocks = [block.model_dump() for block in message.content]
        history.append({"role": "assistant", "content": blocks if stream else message.content})
        return message

    first = turn(tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True})
    assert first.stop_reason == "tool_use"
    (call,) = first.content
    assert call.name in ("weather", "ark") and isinstance(call.input, dict)
    result = {"type": "tool_result", "tool_use_id": call.id, "content": "no rain", "is_error": True}
    history.append({"role": "user", "content": [result, {"type": "text", "text": "Well?"}]})

    second = turn(tools=TOOLS, extra_body={"structured_outputs": THOUGHT})
    assert second.stop_reason == "end_turn"
    thought, text = second.content
    assert thought.thinking == opened(thought.signature) and " " in thought.thinking
    assert text.text.isalpha() and text.text[0].isupper()
    history.append({"role": "user", "content": "And then?"})

    open_end = {"type": "enabled", "budget_tokens": 1024, "display": "omitted"}
    third = turn(thinking=open_end, extra_body={"ignore_eos": True})
    assert third.stop_reason == "max_tokens"
    (hidden,) = third.content
    assert (hidden.type, hidden.thinking) == ("thinking", "")
    assert third.usage.output_tokens == third.usage.output_tokens_details.thinking_tokens == 60
    history.append({"role": "user", "content": "So?"})

    last = turn(tools=TOOLS, tool_choice={"type": "none"})
    assert last.content[0].text

    whole = [
        {**each, "content": [block.model_dump() for block in each["content"]]}
        if not isinstance(each["content"], str) and not isinstance(each["content"][0], dict)
        else each
        for each in history[:-1]
    ]
    asked: Any = {"messages": whole, "tools": TOOLS, "system": "Be brief."}
    prompt, tokens = prompt_of(live.url, chat_of(CountBody.model_validate(asked)))
    assert claude.messages.count_tokens(model="tiny", **asked).input_tokens == tokens
    assert f'"name": "{call.name}", "arguments": {json.dumps(call.input)}' in prompt
    assert "Error: no rain" in prompt and "Be brief." in prompt
    assert f"<think>{thought.thinking}</think>{text.text}" in prompt
    assert f"<think>{opened(hidden.signature)}</think>" in prompt and opened(hidden.signature)


@pytest.mark.parametrize("stream", [False, True])
def test_stops_prefills_and_schemas(claude: anthropic.Anthropic, stream: bool) -> None:
    free = _answer(claude, stream, messages=ASK, max_tokens=16)
    text = free.content[0].text
    assert (free.stop_reason, free.stop_sequence) == ("max_tokens", None)
    word = text.split()[3]
    cut = _answer(claude, stream, messages=ASK, stop_sequences=["no such word", word])
    assert (cut.stop_reason, cut.stop_sequence) == ("stop_sequence", word)
    assert cut.content[0].text == text[: text.index(word)]
    begun = [*ASK, {"role": "assistant", "content": text[: text.index(word)]}]
    rest = _answer(claude, stream, messages=begun, max_tokens=4)
    assert rest.content[0].text.strip()
    form = {"format": {"type": "json_schema", "schema": WEATHER}, "effort": "low"}
    held = _answer(claude, stream, messages=ASK, output_config=form)
    assert json.loads(held.content[0].text)["city"] in ("Zion", "Tyre")
    used = held.usage
    assert used.input_tokens + used.cache_read_input_tokens > 0 and used.output_tokens > 0


def test_an_answer_ends_where_the_context_does(claude: anthropic.Anthropic) -> None:
    asked: Any = {"messages": [{"role": "user", "content": "the " * 480}], "max_tokens": 5000}
    told = claude.messages.count_tokens(model="tiny", messages=asked["messages"])
    found = _answer(claude, True, **asked, extra_body={"ignore_eos": True})
    assert found.stop_reason == "model_context_window_exceeded"
    assert told.input_tokens + found.usage.output_tokens == 1025  # the last one is not stored


def test_a_tool_by_name_and_what_streams_are_made_of(claude: anthropic.Anthropic) -> None:
    choice: Any = {"type": "tool", "name": "weather"}
    arguments: Any = {"model": "tiny", "max_tokens": 100, "messages": ASK, "tools": TOOLS}
    arguments["extra_body"] = {"temperature": 0}
    events = list(claude.messages.create(**arguments, tool_choice=choice, stream=True))
    assert [event.type for event in events] == [
        "message_start",
        "content_block_start",
        "content_block_delta",
        "content_block_stop",
        "message_delta",
        "message_stop",
    ]
    begun, delta = events[1].content_block, events[2].delta
    assert (begun.type, begun.name, begun.input) == ("tool_use", "weather", {})
    assert set(json.loads(delta.partial_json)) == {"city", "days"}
    assert events[0].message.usage.input_tokens > 0
    assert events[4].delta.stop_reason == "tool_use" and events[4].usage.output_tokens > 0


def test_errors_are_those_of_the_client(claude: anthropic.Anthropic, live: Any) -> None:
    with pytest.raises(anthropic.NotFoundError, match="is not served here") as missing:
        claude.messages.create(model="other", max_tokens=1, messages=ASK)
    assert missing.value.type == "not_found_error"
    assert missing.value.request_id == missing.value.body["request_id"]
    with pytest.raises(anthropic.BadRequestError, match="context holds") as long:
        claude.messages.create(model="tiny", max_tokens=1, messages=ASK, system="the " * 1100)
    assert long.value.type == "invalid_request_error"
    reply = claude.messages.with_raw_response.create(model="tiny", max_tokens=1, messages=ASK)
    assert reply.headers["request-id"] == reply.headers["x-request-id"]
    headers = {"anthropic-version": "2023-06-01", "anthropic-beta": "x-2025-01-01"}
    with httpx.Client(base_url=live.url, headers=headers) as client:
        for reply, status, kind in (
            (client.get("/v1/messages"), 405, "invalid_request_error"),
            (client.post("/v1/messages/batches", json={}), 404, "not_found_error"),
            (client.post("/v1/messages", content=b"{"), 415, "invalid_request_error"),
        ):
            told = reply.json()
            assert (reply.status_code, told["error"]["type"]) == (status, kind)
            assert told["type"] == "error" and told["request_id"] == reply.headers["request-id"]


def test_a_whole_answer_in_the_history_and_text_between_results() -> None:
    """Messages in the order of their blocks, whatever else an answer's object has."""
    answer = {
        "id": "msg_1",
        "type": "message",
        "role": "assistant",
        "model": "tiny",
        "content": [
            {"type": "redacted_thinking", "data": "somebody else's"},
            {"type": "text", "text": "I look. "},
            {"type": "tool_use", "id": "a", "name": "ark", "input": [1]},
            {"type": "tool_use", "id": "b", "name": "ark", "input": {}},
        ],
        "stop_reason": "tool_use",
        "stop_sequence": None,
        "usage": {"input_tokens": 1},
    }
    results = [
        {"type": "tool_result", "tool_use_id": "a", "content": [{"type": "text", "text": "one"}]},
        {"type": "text", "text": "and"},
        {"type": "tool_result", "tool_use_id": "b"},
    ]
    system = [{"type": "text", "text": "Be ", "cache_control": {}}, {"type": "text", "text": "it."}]
    asked: Any = {"max_tokens": 5, "messages": [*ASK, answer], "system": system}
    asked["messages"].append({"role": "user", "content": results})
    body = MessagesBody.model_validate(asked)
    given = [message.model_dump(exclude_none=True) for message in chat_of(body).messages]
    assert [(each["role"], each["content"]) for each in given] == [
        ("system", "Be it."),
        ("user", "Who is the Lord?"),
        ("assistant", "I look. "),
        ("tool", "one"),
        ("user", "and"),
        ("tool", ""),
    ]
    assert [call["function"]["arguments"] for call in given[2]["tool_calls"]] == ["[1]", {}]
