"""Many clients, polite and not: every request is answered, nothing stays in the cache."""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from typing import Any

import httpx
import psutil

REQUESTS = int(os.environ.get("HMC_TEST_REQUESTS", "100"))
MALFORMED = (
    b"",
    b"{",
    b"null",
    b"[1, 2]",
    b'"text"',
    b'{"model": "tiny"}',
    b'{"model": "tiny", "prompt": {}}',
    b'{"model": "tiny", "prompt": [1.5]}',
    b'{"model": "tiny", "prompt": [-1]}',
    b'{"model": "tiny", "prompt": [true]}',
    b'{"model": "tiny", "prompt": []}',
    b'{"model": "tiny", "prompt": [[]]}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    b'{"model": "tiny", "prompt": "x", "max_tokens": 99999999999999999999}',
    b'{"model": "tiny", "prompt": "x", "seed": 99999999999999999999999}',
    b'{"model": "tiny", "prompt": "x", "top_k": 99999999999999999999999}',
    b'{"model": "tiny", "prompt": "x", "stop": [1]}',
    b'{"model": "tiny", "prompt": "\xff\xfe"}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b"\x00" * 100,
)


def _body(pick: random.Random) -> dict[str, Any]:
    body: dict[str, Any] = {
        "model": "tiny",
        "prompt": [0, *(pick.randrange(4, 4096) for _ in range(pick.randrange(1, 120)))],
        "max_tokens": pick.randrange(1, 60),
        "temperature": pick.choice([0, 0.9]),
        "n": pick.choice([1, 1, 1, 2]),
    }
    if pick.random() < 0.3:
        body["logprobs"] = pick.randrange(3)
        body["echo"] = pick.random() < 0.5
    return body


async def _one(client: httpx.AsyncClient, seed: int) -> str:
    """One client; what became of it."""
    pick = random.Random(seed)
    route, body = "/v1/completions", _body(pick)
    kind = pick.choice(["whole", "stream", "hang up", "time out", "malformed", "cut"])
    if kind == "malformed":
        headers = {"Content-Type": "application/json"}
        content = pick.choice(MALFORMED)
        reply = await client.post(route, content=content, headers=headers)
        huge = content in MALFORMED[14:17]
        assert reply.status_code == 400 or (huge and reply.status_code == 200), content
        if reply.status_code == 400:
            assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
    elif kind == "whole":
        reply = await client.post(route, json=body)
        assert reply.status_code in (200, 429), reply.text
        if reply.status_code == 200:
            assert len(reply.json()["choices"]) == body["n"]
    elif kind == "time out":
        try:
            await asyncio.wait_for(client.post(route, json=body), pick.random() * 0.1)
        except TimeoutError:
            return "gone"
    elif kind == "cut":
        text = json.dumps(body).encode()
        _, writer = await asyncio.open_connection(client.base_url.host, client.base_url.port)
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        writer.write(f"{head}Content-Length: {len(text)}\r\n\r\n".encode())
        writer.write(text[: pick.randrange(len(text) + 1)])
        await writer.drain()
        writer.close()
        await writer.wait_closed()
    else:
        async with client.stream("POST", route, json={**body, "stream": True}) as reply:
            assert reply.status_code in (200, 429)
            events = []
            async for line in reply.aiter_lines():
                if line.startswith("data: "):
                    events.append(line)
                if kind == "hang up" and len(events) > pick.randrange(4):
                    return "gone"
            assert reply.status_code == 429 or events[-1] == "data: [DONE]"
    return kind


def test_rude_clients_leave_nothing_behind(live: Any) -> None:
    async def all_of_them(seeds: range) -> list[str]:
        limits = httpx.Limits(max_connections=32)
        async with httpx.AsyncClient(base_url=live.url, timeout=60, limits=limits) as client:
            gate = asyncio.Semaphore(24)

            async def bounded(seed: int) -> str:
                async with gate:
                    return await _one(client, seed)

            return await asyncio.gather(*(bounded(seed) for seed in seeds))

    asyncio.run(all_of_them(range(50)))
    before = psutil.Process().memory_info().rss
    kinds = asyncio.run(all_of_them(range(50, 50 + REQUESTS)))
    assert len(kinds) == REQUESTS
    assert psutil.Process().memory_info().rss - before < 64e6
    assert len(set(kinds)) >= 5
    scheduler = live.service.scheduler
    until = time.monotonic() + 10
    while time.monotonic() < until:
        stats = scheduler.stats()
        if not (stats.running or stats.prefilling or stats.waiting or stats.kv_used):
            break
        time.sleep(0.02)
    assert (stats.running, stats.prefilling, stats.waiting, stats.kv_used) == (0, 0, 0, 0)
    assert stats.error == "" and httpx.get(f"{live.url}/health").status_code == 200
    assert stats.finished["cancelled"] > 0
    assert "error" not in stats.finished


def test_concurrent_greedy_answers_are_those_of_each_alone(live: Any) -> None:
    pick = random.Random(5)
    bodies = [
        {**_body(pick), "temperature": 0, "n": 1, "return_token_ids": True} for _ in range(32)
    ]

    async def ask(bodies: list[dict[str, Any]]) -> list[list[int]]:
        async with httpx.AsyncClient(base_url=live.url, timeout=60) as client:
            replies = await asyncio.gather(
                *(client.post("/v1/completions", json=body) for body in bodies)
            )
            return [reply.json()["choices"][0]["token_ids"] for reply in replies]

    together = asyncio.run(ask(bodies))
    alone = [asyncio.run(ask([body]))[0] for body in bodies]
    assert together == alone


def test_a_client_that_hangs_up_is_cancelled(live: Any) -> None:
    scheduler = live.service.scheduler
    before = scheduler.stats().finished.get("cancelled", 0)
    body = {"model": "tiny", "prompt": "And", "max_tokens": 900, "ignore_eos": True}
    with httpx.stream("POST", f"{live.url}/v1/completions", json={**body, "stream": True}) as reply:
        next(reply.iter_lines())
    until = time.monotonic() + 5
    while time.monotonic() < until and scheduler.stats().kv_used:
        time.sleep(0.005)
    assert scheduler.stats().kv_used == 0
    assert scheduler.stats().finished["cancelled"] == before + 1
