"""Anthropic's Messages and OpenAI's Responses: the table of bodies, how both refuse and fail."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import interfaces_table
import pytest

from hmc.errors import WorkerError
from hmc.plan import Plan
from hmc.serve.generate import News
from hmc.serve.parts import Parts
from hmc.serve.service import Settings
from hmc.serve.tools import Call

TABLE = interfaces_table.table()
ASK: Any = {"messages": [{"role": "user", "content": "Who?"}], "max_tokens": 8}


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 120
    assert sum(bool(named) for _, _, named in TABLE) >= 50


@pytest.mark.few(2)
@pytest.mark.parametrize("number", range(0, len(TABLE), 32))
def test_bodies_are_taken_or_refused_by_name(live: Any, number: int) -> None:
    """Some at a time: what is wrong of these is told together."""
    wrong = []
    with httpx.Client(base_url=f"{live.url}/v1/", timeout=60) as client:
        for route, body, named in TABLE[number : number + 32]:
            reply = client.post(route, json=body)
            unknown = reply.headers.get("x-hmc-unknown-fields", "")
            if named:
                error = reply.json().get("error", {})
                told = f"{error.get('param')} {error.get('message')}"
                fine = reply.status_code == 400 and named in told and "\n" not in told
            else:
                fine = reply.status_code == 200
            if not fine or unknown:
                wrong.append((route, body, named, reply.status_code, reply.text[:300], unknown))
    assert not wrong


def test_keys_full_queues_and_broken_streams(plan: Plan, start: Callable[..., Any]) -> None:
    settings = Settings(
        name="tiny",
        api_keys=("s3cret",),
        max_body_bytes=2000,
        max_queue=1,
        keep_alive_seconds=0.1,
    )
    with start(plan, settings) as live, httpx.Client(base_url=live.url, timeout=60) as client:
        live.wait_ready()

        def kind(reply: httpx.Response) -> tuple[int, str]:
            assert reply.json()["request_id"] == reply.headers["request-id"]
            return reply.status_code, reply.json()["error"]["type"]

        for headers in ({}, {"x-api-key": "no"}, {"Authorization": "s3cret"}):
            reply = client.post("/v1/messages", json=ASK, headers=headers)
            assert kind(reply) == (401, "authentication_error")
        client.headers["x-api-key"] = "s3cret"
        assert client.post("/v1/messages", json=ASK).status_code == 200
        assert client.get("/v1/models").status_code == client.get("/props").status_code == 200
        large = client.post("/v1/messages", json={**ASK, "system": "x" * 3000})
        assert kind(large) == (413, "request_too_large")

        engine, scheduler = live.service.ready()
        release = threading.Event()

        def breaks(*_: Any) -> None:
            release.wait(20)
            raise WorkerError("it broke")

        engine.executor.decode = breaks
        asked = {"max_output_tokens": 9, "input": "Who?", "stream": True}
        with ThreadPoolExecutor(1) as pool:
            with client.stream("POST", "/v1/messages", json={**ASK, "stream": True}) as reply:
                lines = reply.iter_lines()
                seen = [next(line for line in lines if line == "event: ping") for _ in range(3)]
                waits = pool.submit(client.post, "/v1/responses", json=asked)
                until = time.monotonic() + 20
                while not scheduler.stats().waiting and time.monotonic() < until:
                    time.sleep(0.01)
                full = client.post("/v1/messages", json=ASK)
                assert kind(full) == (429, "rate_limit_error")
                assert int(full.headers["retry-after"]) > 0
                release.set()
                *_, last = (line for line in lines if line.startswith("data: "))
            text = waits.result().text
        assert len(seen) == 3
        error = {"type": "overloaded_error", "message": "it broke"}
        assert json.loads(last.removeprefix("data: ")) == {"type": "error", "error": error}
        failed = json.loads(text.rpartition("data: ")[2])
        assert (failed["type"], failed["response"]["status"]) == ("response.failed", "failed")
        assert failed["response"]["error"] == {"code": "server_error", "message": "it broke"}
        assert kind(client.post("/v1/messages", json=ASK)) == (529, "overloaded_error")


CALLS = 'I look.\n<tool_call>\n{"name": "ark", "arguments": {"a": "\\ud800"}}\n</tool_call>\n'
CALLS += '<tool_call>\n{"name": "ark", "arguments": [1]}\n</tool_call>'
"""What a model may write: text, half a character as an escape, arguments that are no object."""


@pytest.mark.parametrize("stream", [False, True])
def test_text_before_calls_and_arguments_of_any_json(live: Any, stream: bool) -> None:
    more: Any = {"structured_outputs": {"choice": [CALLS]}, "stream": stream}
    ark: Any = {"name": "ark", "input_schema": {"type": "object"}}
    body = {**ASK, "max_tokens": 200, "tools": [ark], **more}
    tools = [{"type": "function", "name": "ark"}]
    items = {"input": "Who?", "tools": tools, **more}
    with httpx.Client(base_url=live.url, timeout=60) as client:
        message, response = (
            _told(client.post(route, json=body), stream)
            for route, body in (("/v1/messages", body), ("/v1/responses", items))
        )
        chat = client.post(
            "/v1/chat/completions",
            json={**body, "tools": [{"type": "function", "function": {"name": "ark"}}]},
        )
        assert chat.status_code == 200
    if stream:
        begun = [event["content_block"] for event in message if "content_block" in event]
        given = [event["delta"] for event in message if event["type"] == "content_block_delta"]
        assert "".join(delta.get("text", "") for delta in given) == "I look."
        given = [json.loads(d["partial_json"]) for d in given if "partial_json" in d]
        assert [block["type"] for block in begun] == ["text", "tool_use", "tool_use"]
        output = response[-1]["response"]["output"]
    else:
        assert message["stop_reason"] == "tool_use"
        text, *calls = message["content"]
        assert text["text"] == "I look."
        given, output = [call["input"] for call in calls], response["output"]
    assert given == [{"a": "\ud800"}, [1]]
    assert output[0]["content"][0]["text"] == "I look."
    assert [json.loads(call["arguments"]) for call in output[1:]] == given


def _told(reply: httpx.Response, stream: bool) -> Any:
    """The whole answer, or its events."""
    assert reply.status_code == 200, reply.text
    if not stream:
        return json.loads(reply.text)
    lines = [line for line in reply.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line.removeprefix("data: ")) for line in lines]


def test_props_are_those_of_a_llama_server(live: Any) -> None:
    told = httpx.get(f"{live.url}/props").json()
    assert told["total_slots"] > 1 and told["model_alias"] == "tiny"
    assert told["default_generation_settings"]["n_ctx"] > 1
    assert told["model_path"].endswith("tiny") and told["build_info"].startswith("hmc ")
    assert told["modalities"] == {"vision": False, "audio": False}
    assert "tool_call" in told["chat_template"]


def test_a_router_is_told_the_models_name(live: Any) -> None:
    told = httpx.get(f"{live.url}/server_info").json()
    assert told["served_model_name"] == "tiny" and told["version"].startswith("hmc ")
    assert told["max_running_requests"] == httpx.get(f"{live.url}/props").json()["total_slots"]


def _parts(news: list[tuple[str, str, list[Call], str | None]], calls: bool) -> list[Any]:
    parts = Parts(calls=calls)
    steps = [s for n in news for s in parts.take(News(0, False, *n[:3], (), (), n[3]))]
    begun = [step.part.number for step in steps if step.what == "begins"]
    assert begun == [step.part.number for step in steps if step.what == "ends"]
    for part in parts.all:
        more = [step.text for step in steps if step.what == "more" and step.part is part]
        assert "".join(more) == part.text
    return [(part.kind, part.text, part.cut) for part in parts.all]


def test_parts_are_what_was_said_in_its_order() -> None:
    call = Call("ark", "{}")
    news: list[Any] = [
        ("He ", "", [], None),
        ("is.", "Well", [], None),
        ("", ". \n", [call], None),
        ("", "\n", [call], None),
        ("", "\n", [], "tool_calls"),
    ]
    expected = [
        ("thought", "He is.", False),
        ("text", "Well.", False),
        *[("call", "{}", False)] * 2,
    ]
    assert _parts(news, True) == expected
    blank: list[Any] = [("", " \n", [], None), ("", "a ", [], None), ("", "", [], "length")]
    assert _parts(blank, True) == _parts(blank, False) == [("text", " \na ", True)]
    assert _parts([("", "", [], "stop")], True) == []
