"""The official `openai` client against a live server."""

from __future__ import annotations

import json
from typing import Any

import openai
import pytest

ASK: Any = [{"role": "user", "content": "Who is the Lord?"}]
WEATHER = {
    "type": "object",
    "properties": {"city": {"enum": ["Zion", "Tyre"]}, "days": {"type": "integer", "maximum": 9}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOLS: Any = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {
        "type": "function",
        "function": {"name": "ark", "parameters": {"type": "object", "properties": {}}},
    },
]


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "hmc"


def test_chat_and_its_stream_say_the_same(client: openai.OpenAI) -> None:
    arguments: Any = {"model": "tiny", "messages": ASK, "max_tokens": 12, "temperature": 0}
    whole = client.chat.completions.create(**arguments)
    answer = whole.choices[0]
    assert answer.message.role == "assistant" and answer.message.content
    assert answer.finish_reason == "length"
    assert whole.usage is not None and whole.usage.completion_tokens == 12
    stream = client.chat.completions.create(
        **arguments, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == answer.message.content
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.prompt_tokens == whole.usage.prompt_tokens
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "length"


def test_seed_n_and_stop(client: openai.OpenAI) -> None:
    arguments: Any = {"model": "tiny", "messages": ASK, "max_tokens": 16, "temperature": 1.0}
    one, two = (client.chat.completions.create(**arguments, n=3, seed=7) for _ in range(2))
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) == 3
    assert one.usage is not None and one.usage.completion_tokens == 48
    greedy = client.chat.completions.create(**{**arguments, "temperature": 0})
    text = greedy.choices[0].message.content
    assert text is not None
    word = text.split()[3]
    cut = client.chat.completions.create(**{**arguments, "temperature": 0}, stop=[word])
    assert cut.choices[0].finish_reason == "stop"
    assert cut.choices[0].message.content == text[: text.index(word)]


def test_logprobs_of_chat(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=5, temperature=0, logprobs=True, top_logprobs=3
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None and logprobs.content is not None
    assert len(logprobs.content) == 5
    assert "".join(entry.token for entry in logprobs.content) == answer.choices[0].message.content
    for entry in logprobs.content:
        assert len(entry.top_logprobs) == 3
        assert entry.logprob == entry.top_logprobs[0].logprob  # greedy takes the likeliest
        assert bytes(entry.bytes or []).decode() == entry.token


def test_json_schema_and_object(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=80,
        temperature=1.0,
        seed=1,
        response_format={
            "type": "json_schema",
            "json_schema": {"name": "weather", "schema": WEATHER, "strict": True},
        },
    )
    assert answer.choices[0].finish_reason == "stop"
    found = json.loads(answer.choices[0].message.content or "")
    assert found["city"] in ("Zion", "Tyre") and found["days"] <= 9 and len(found) == 2
    text = ""
    for chunk in client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=40,
        temperature=0,
        response_format={"type": "json_object"},
        stream=True,
    ):
        text += chunk.choices[0].delta.content or ""
    assert text.startswith("{")


def test_a_bad_schema_is_refused(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="schema cannot be used"):
        client.chat.completions.create(
            model="tiny",
            messages=ASK,
            response_format={
                "type": "json_schema",
                "json_schema": {"name": "x", "schema": {"type": "no such type"}},
            },
        )


@pytest.mark.parametrize(
    "choice", ["required", {"type": "function", "function": {"name": "weather"}}]
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_call_that_has_to_come(client: openai.OpenAI, choice: Any, stream: bool) -> None:
    tools = TOOLS[:1] if choice == "required" else TOOLS
    arguments: Any = {"model": "tiny", "messages": ASK, "tools": tools, "tool_choice": choice}
    arguments |= {"max_tokens": 100, "temperature": 0}
    if stream:
        chunks = list(client.chat.completions.create(**arguments, stream=True))
        (call,) = [each for c in chunks for each in c.choices[0].delta.tool_calls or ()]
        reason = chunks[-1].choices[0].finish_reason
    else:
        answer = client.chat.completions.create(**arguments)
        (call,) = answer.choices[0].message.tool_calls
        assert answer.choices[0].message.content is None
        reason = answer.choices[0].finish_reason
    assert reason == "tool_calls"
    assert call.function.name == "weather"
    found = json.loads(call.function.arguments)
    assert found["city"] in ("Zion", "Tyre") and set(found) == {"city", "days"}


def test_tools_that_may_be_called_and_the_answer_of_one(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        answer = client.chat.completions.create(
            model="tiny", messages=ASK, tools=TOOLS, tool_choice=choice, max_tokens=8, temperature=0
        )
        assert answer.choices[0].message.content
    call = {"id": "1", "type": "function", "function": {"name": "ark", "arguments": "{}"}}
    history: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "300 cubits", "tool_call_id": "1"},
    ]
    answer = client.chat.completions.create(
        model="tiny", messages=history, tools=TOOLS, max_tokens=8, temperature=0
    )
    assert answer.choices[0].message.content


def _turn(client: openai.OpenAI, history: list[Any], stream: bool, **more: Any) -> Any:
    """One answer, put into the history as the client's own object gives it."""
    arguments: Any = {"model": "tiny", "messages": history, "max_tokens": 60, "temperature": 0}
    if stream:
        with client.chat.completions.stream(**arguments, **more) as events:
            snapshots = [event.snapshot for event in events if event.type == "chunk"]
        choice = snapshots[-1].choices[0]
    else:
        choice = client.chat.completions.create(**arguments, **more).choices[0]
    history.append(choice.message.model_dump())
    return choice


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_with_tools_and_reasoning_sent_back_verbatim(
    client: openai.OpenAI, stream: bool
) -> None:
    tools: Any = [{**TOOLS[0], "function": {**TOOLS[0]["function"], "strict": True}}]
    history = list(ASK)
    choice = _turn(client, history, stream, tools=tools, tool_choice="required")
    assert choice.finish_reason == "tool_calls"
    (call,) = choice.message.tool_calls
    history.append({"role": "tool", "tool_call_id": call.id, "content": "rain"})

    thought = {"regex": "<think>\n[a-z]{3,9} [a-z]{2,8}\n</think>\n\n[A-Z][a-z]{2,12}"}
    choice = _turn(client, history, stream, tools=tools, extra_body={"structured_outputs": thought})
    assert choice.finish_reason == "stop"
    thinking, content = choice.message.reasoning_content, choice.message.content
    assert thinking == thinking.strip() and " " in thinking
    assert content.isalpha() and content[0].isupper()
    history.append({"role": "user", "content": "And then?"})

    opened = {"chat_template_kwargs": {"enable_thinking": True}, "ignore_eos": True}
    choice = _turn(client, history, stream, extra_body=opened)
    assert choice.finish_reason == "length" and not choice.message.content
    assert choice.message.reasoning_content
    history.append({"role": "user", "content": "So?"})

    assert _turn(client, history, stream).message.content
    prompt = _prompt(client, history, tools=tools)
    assert json.dumps(json.loads(call.function.arguments)) in prompt
    assert f"<think>{thinking}</think>{content}" in prompt
    assert choice.message.reasoning_content in prompt


def _prompt(client: openai.OpenAI, messages: list[Any], **more: Any) -> str:
    """What the model reads of a conversation, without special tokens."""
    base = str(client.base_url).removesuffix("/v1/")
    ids = client._client.post(f"{base}/tokenize", json={"messages": messages, **more}).json()
    reply = client._client.post(f"{base}/detokenize", json={"tokens": ids["tokens"]})
    return str(reply.json()["prompt"])


def test_a_thought_that_the_template_opens_is_closed_before_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=60,
        seed=1,
        reasoning_effort="high",
        extra_body={"guided_json": WEATHER},
    )
    message: Any = answer.choices[0].message
    assert json.loads(message.content)["city"] in ("Zion", "Tyre")
    assert not hasattr(message, "reasoning_content")


def test_reasoning_is_left_out_or_left_in(client: openai.OpenAI) -> None:
    for more, content in (
        ({"include_reasoning": False}, "Yes"),
        ({"reasoning_format": "none"}, "<think>a</think>Yes"),
    ):
        guide = {"structured_outputs": {"choice": ["<think>a</think>Yes"]}, **more}
        answer = client.chat.completions.create(model="tiny", messages=ASK, extra_body=guide)
        message: Any = answer.choices[0].message
        assert message.content == content and not hasattr(message, "reasoning_content")


def test_one_call_where_parallel_ones_are_not_wanted(client: openai.OpenAI) -> None:
    call = '<tool_call>{"name": "ark", "arguments": {}}</tool_call>'
    guide = {"structured_outputs": {"choice": [call * 2]}}
    for parallel, number in ((True, 2), (False, 1)):
        answer = client.chat.completions.create(
            model="tiny",
            messages=ASK,
            tools=TOOLS,
            parallel_tool_calls=parallel,
            extra_body=guide,
        )
        assert len(answer.choices[0].message.tool_calls or ()) == number


def test_the_last_message_is_continued(client: openai.OpenAI) -> None:
    begun = [*ASK, {"role": "assistant", "content": "The LORD is my shepherd; I "}]
    more: Any = {"continue_final_message": True}
    assert _prompt(client, begun, **more).endswith("The LORD is my shepherd; I ")
    answer = client.chat.completions.create(
        model="tiny", messages=begun, max_tokens=6, temperature=0, extra_body=more
    )
    base = str(client.base_url).removesuffix("/v1/")
    ids = client._client.post(f"{base}/tokenize", json={"messages": begun, **more}).json()["tokens"]
    plain = client.completions.create(model="tiny", prompt=ids, max_tokens=6, temperature=0)
    assert answer.choices[0].message.content == plain.choices[0].text
    bare = _prompt(client, ASK, add_generation_prompt=False)
    assert bare == _prompt(client, ASK)  # the tag that begins an answer is a special token


def test_biases_and_penalties_change_answers(client: openai.OpenAI) -> None:
    arguments: Any = {"model": "tiny", "prompt": "And", "max_tokens": 4, "temperature": 0}
    chosen = client.completions.create(**arguments, logit_bias={"77": 100}, logprobs=1)
    assert chosen.choices[0].logprobs is not None
    tokens = chosen.choices[0].logprobs.tokens
    assert tokens is not None and len(tokens) == 4 and len(set(tokens)) == 1
    held = client.completions.create(
        **arguments, logit_bias={"77": 4, "78": 3}, frequency_penalty=2, presence_penalty=2
    )
    assert held.choices[0].text != chosen.choices[0].text


def test_completions_of_texts_ids_and_batches(client: openai.OpenAI) -> None:
    arguments: Any = {"model": "tiny", "max_tokens": 8, "temperature": 0}
    prompts = ["In the beginning", "And the LORD said"]
    alone = [client.completions.create(prompt=p, **arguments).choices[0].text for p in prompts]
    both = client.completions.create(prompt=prompts, **arguments, n=2)
    assert [choice.text for choice in both.choices] == [alone[0]] * 2 + [alone[1]] * 2
    assert [choice.index for choice in both.choices] == [0, 1, 2, 3]
    base = str(client.base_url).removesuffix("/v1/")
    ids = []
    for prompt in prompts:
        reply = client._client.post(f"{base}/tokenize", json={"prompt": prompt}).json()
        assert reply["count"] == len(reply["tokens"])
        text = client._client.post(f"{base}/detokenize", json={"tokens": reply["tokens"]}).json()
        assert text == {"prompt": prompt}
        ids.append(reply["tokens"])
    by_ids = client.completions.create(prompt=ids, **arguments)
    assert [choice.text for choice in by_ids.choices] == alone
    assert client.completions.create(prompt=ids[0], **arguments).choices[0].text == alone[0]
    echoed = client.completions.create(prompt=prompts[0], echo=True, **arguments)
    assert echoed.choices[0].text == prompts[0] + alone[0]
    streamed = client.completions.create(prompt=prompts[0], stream=True, echo=True, **arguments)
    assert "".join(c.choices[0].text for c in streamed) == prompts[0] + alone[0]


def test_errors_name_what_is_wrong(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="other", messages=ASK)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as unserved:
        client.chat.completions.create(model="tiny", messages=ASK, modalities=["audio"])
    assert (unserved.value.param, unserved.value.code) == ("modalities", "unsupported_value")
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="tiny", prompt=[5] * 5000)
    assert long.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as much:
        client.completions.create(model="tiny", prompt=[5] * 1000, max_tokens=100)
    assert much.value.code == "context_length_exceeded"
    for wrong, name in (
        ({"temperature": -1}, "temperature"),
        ({"n": 0}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"prompt": [[5, 99999]]}, "99999"),
        ({"prompt": ""}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
    ):
        with pytest.raises(openai.BadRequestError, match=name):
            client.completions.create(**{"model": "tiny", "prompt": "x", **wrong})  # type: ignore[call-overload]
