"""The table of bodies against a live server."""

from __future__ import annotations

from typing import Any

import bodies_table
import httpx
import pytest

TABLE = bodies_table.table()


def test_the_table_is_long_enough() -> None:
    assert len(TABLE) >= 150
    assert sum(bool(named) for _, _, named in TABLE) >= 50


@pytest.mark.parametrize("number", range(0, len(TABLE), 16))
def test_bodies_are_taken_or_refused_by_name(live: Any, number: int) -> None:
    """Some at a time: what is wrong of these is told together."""
    wrong = []
    with httpx.Client(base_url=f"{live.url}/v1/", timeout=60) as client:
        for route, body, named in TABLE[number : number + 16]:
            reply = client.post(route, json=body)
            if named:
                error = reply.json().get("error", {})
                told = f"{error.get('param')} {error.get('message')}"
                fine = reply.status_code == 400 and named in told and "\n" not in told
            else:
                fine = reply.status_code == 200
            if not fine:
                wrong.append((body, named, reply.status_code, reply.text[:300]))
    assert not wrong


def test_unknown_fields_are_counted_and_named(live: Any) -> None:
    body = {
        "messages": [{"role": "user", "content": "Who?", "co\r\nlour": 1}],
        "max_tokens": 1,
        "colour": "red",
        "store": True,
        "none": None,
    }
    with httpx.Client(base_url=live.url, timeout=60) as client:

        def counted() -> float:
            name = 'hmc_unknown_fields_total{route="/v1/chat/completions"}'
            lines = client.get("/metrics").text.splitlines()
            return next((float(line.split()[1]) for line in lines if line.startswith(name)), 0)

        before = counted()
        reply = client.post("/v1/chat/completions", json=body)
        assert reply.status_code == 200
        assert reply.headers["x-hmc-unknown-fields"] == "colour, messages.0.co??lour"
        assert counted() == before + 2
        many = client.post("/v1/chat/completions", json=body | {f"x{i}": i for i in range(999)})
        assert many.status_code == 200 and len(many.headers["x-hmc-unknown-fields"]) < 2000
        streamed = client.post("/v1/chat/completions", json=body | {"stream": True})
        assert streamed.headers["x-hmc-unknown-fields"].startswith("colour")
        known = client.post("/v1/chat/completions", json={**body, "messages": [], "colour": None})
        assert known.status_code == 400 and "x-hmc-unknown-fields" not in known.headers
