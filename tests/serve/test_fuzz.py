"""Clients beside each other: each gets the answer it would get alone; one that hangs up is gone."""

from __future__ import annotations

import asyncio
import random
import time
from typing import Any

import httpx


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
