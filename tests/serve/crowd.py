"""A crowd of clients, polite and not, over every interface of a server: each asks one thing, drawn
from its seed, checks what it is told and says what became of it.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import httpx

SECONDS = 120.0
"""What any one client may take."""

KINDS = (
    *("whole", "stream", "hang up", "give up", "malformed", "cut", "slow sender"),
    *("slow reader", "deaf reader", "tokenize", "too long"),
)
MALFORMED = (
    b"",
    b"{",
    b"null",
    b"[1, 2]",
    b'"text"',
    b'{"model": "tiny"}',
    b'{"model": "tiny", "prompt": {}, "messages": {}, "input": {}}',
    b'{"model": "tiny", "prompt": [1.5], "messages": [1.5], "input": [1.5]}',
    b'{"model": "tiny", "prompt": [-1], "messages": [-1], "input": [-1]}',
    b'{"model": "tiny", "prompt": [], "messages": [], "input": []}',
    b'{"model": "tiny", "prompt": "x", "temperature": NaN}',
    b'{"model": "tiny", "prompt": "x", "temperature": 1e999}',
    b'{"model": "tiny", "prompt": "x", "stop": [1], "max_tokens": "many"}',
    b'{"model": "tiny", "prompt": "\xff\xfe"}',
    b'{"model": "tiny", "prompt": "\\ud800"}',
    b'{"model": ' + b"[" * 5000 + b"]" * 5000 + b"}",
    b"\x00" * 100,
)
SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["Moses", "Aaron"]}, "years": {"type": "integer"}},
    "required": ["name", "years"],
}
TOOL = {"name": "find", "description": "Find a verse", "parameters": SCHEMA}
FULL = 429
"""What a crowd that is larger than the queue may be told."""


@dataclass
class Told:
    """What became of a crowd: how many of each kind and of each status, and the slowest answer of
    /health in seconds.
    """

    kinds: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    health: float = 0.0
    polls: int = 0


def ask(pick: random.Random) -> tuple[str, dict[str, Any]]:
    """A route that answers with tokens, and a body for it."""
    words = " ".join(pick.choice(("And", "the", "Lord", "spake", "unto")) for _ in range(12))
    text = f"{pick.random()} {words}" * pick.choice((1, 1, 1, 8))
    most, temperature = pick.randrange(1, pick.choice((60, 60, 200))), pick.choice((0, 0.9))
    common = {"model": "tiny", "temperature": temperature}
    match pick.choice(("completions", "chat", "messages", "responses")):
        case "completions":
            extra = pick.choice(
                (
                    {},
                    {"n": 3},
                    {"logprobs": 2, "echo": pick.random() < 0.5},
                    {"prompt": [0, *(pick.randrange(4, 4096) for _ in range(700))]},
                    {"structured_outputs": {"regex": "(amen|selah)( amen){2,9}"}},
                )
            )
            return "/v1/completions", {**common, "prompt": text, "max_tokens": most, **extra}
        case "chat":
            schema = {"type": "json_schema", "json_schema": {"name": "who", "schema": SCHEMA}}
            tools = [{"type": "function", "function": TOOL}]
            extra = pick.choice(
                (
                    {},
                    {"n": 2},
                    {"response_format": schema},
                    {"tools": tools, "tool_choice": pick.choice(("auto", "required"))},
                )
            )
            chat = {"messages": [{"role": "user", "content": text}], "max_tokens": most}
            return "/v1/chat/completions", {**common, **chat, **extra}
        case "messages":
            own = {"name": "find", "description": "Find a verse", "input_schema": SCHEMA}
            extra = pick.choice(({}, {"tools": [own], "tool_choice": {"type": "any"}}))
            chat = {"messages": [{"role": "user", "content": text}], "max_tokens": most}
            return "/v1/messages", {**common, **chat, **extra}
        case _:
            style = {"format": {"type": "json_schema", "name": "who", "schema": SCHEMA}}
            extra = pick.choice(({}, {"text": style}, {"tools": [{"type": "function", **TOOL}]}))
            return "/v1/responses", {**common, "input": text, "max_output_tokens": most, **extra}


def ends_whole(route: str, last: str) -> bool:
    """Whether the last line of a stream is what that interface ends one with."""
    data = last.removeprefix("data: ")
    if route == "/v1/messages":
        return json.loads(data)["type"] == "message_stop"
    if route == "/v1/responses":
        return json.loads(data)["type"] in ("response.completed", "response.incomplete")
    return data == "[DONE]"


class Crowd:
    """Clients of the server at `url`, at most `at_once` of them at a time."""

    def __init__(self, url: str, at_once: int) -> None:
        self._at_once, self.told = at_once, Told()
        limits = httpx.Limits(max_connections=at_once, max_keepalive_connections=at_once)
        self._client = httpx.AsyncClient(base_url=url, timeout=SECONDS, limits=limits)
        self._host, self._port = urlsplit(url).hostname, urlsplit(url).port
        self._watcher = httpx.AsyncClient(base_url=url, timeout=SECONDS)

    async def come(self, seeds: Iterable[int]) -> Told:
        """One client a seed; raises what the first of them that fails raises."""
        gate = asyncio.Semaphore(self._at_once)

        async def bounded(seed: int) -> None:
            async with gate, asyncio.timeout(SECONDS):
                self.told.kinds[await self._one(seed)] += 1

        async with self._client, self._watcher:
            watch = asyncio.create_task(self._watch_health())
            async with asyncio.TaskGroup() as clients:
                for seed in seeds:
                    clients.create_task(bounded(seed))
            watch.cancel()
            await asyncio.wait({watch})
            if not watch.cancelled():
                watch.result()
        return self.told

    async def _watch_health(self) -> None:
        while True:
            begin = time.monotonic()
            reply = await self._watcher.get("/health")
            assert reply.status_code == 200 and reply.json()["status"] == "ready", reply.text
            self.told.health = max(self.told.health, time.monotonic() - begin)
            self.told.polls += 1
            await asyncio.sleep(0.1)

    async def _one(self, seed: int) -> str:
        pick = random.Random(seed)
        kind = pick.choice(KINDS)
        if kind == "tokenize":
            text = {"prompt": "And he said " * pick.randrange(1, 400)}
            chat = {"messages": [{"role": "user", "content": "Who?"}]}
            reply = await self._send("/tokenize", {"model": "tiny", **pick.choice((text, chat))})
            assert reply.status_code == FULL or reply.json()["count"] > 0
            return kind
        route, body = ask(pick)
        if kind == "malformed":
            headers = {"Content-Type": "application/json"}
            content = pick.choice(MALFORMED)
            reply = await self._client.post(route, content=content, headers=headers)
            assert reply.status_code in (400, FULL) or b'"prompt": "x"' in content, reply.text
            self.told.statuses[reply.status_code] += 1
        elif kind == "too long":
            reply = await self._send(
                "/v1/completions", {"model": "tiny", "prompt": "Amen. " * 9000}
            )
            assert reply.status_code in (400, FULL), reply.text
        elif kind == "whole":
            reply = await self._send(route, body)
            assert reply.status_code in (200, FULL), reply.text
            if reply.status_code == 200 and "n" in body:
                assert len(reply.json()["choices"]) == body["n"]
        elif kind == "give up":
            try:
                async with asyncio.timeout(pick.random() * 0.2):
                    await self._send(route, body)
            except TimeoutError:
                return kind
        elif kind in ("stream", "hang up"):
            await self._read(route, body, pick.randrange(6) if kind == "hang up" else None)
        else:
            await self._by_hand(kind, route, body, pick)
        return kind

    async def _send(self, route: str, body: dict[str, Any]) -> httpx.Response:
        reply = await self._client.post(route, json=body)
        self.told.statuses[reply.status_code] += 1
        return reply

    async def _read(self, route: str, body: dict[str, Any], most: int | None) -> None:
        """A stream to its end, or `most` events of it."""
        events: list[str] = []
        async with self._client.stream("POST", route, json={**body, "stream": True}) as reply:
            self.told.statuses[reply.status_code] += 1
            assert reply.status_code in (200, FULL)
            async for line in reply.aiter_lines():
                events += [line] if line.startswith("data: ") else []
                if most is not None and len(events) > most:
                    return
        assert reply.status_code == FULL or ends_whole(route, events[-1]), events[-1]

    async def _by_hand(
        self, kind: str, route: str, body: dict[str, Any], pick: random.Random
    ) -> None:
        """Over a socket of its own: bodies that come in pieces or are cut off, answers that are
        read slowly or not at all.
        """
        text = json.dumps({**body, "stream": kind != "slow sender"}).encode()
        ours = socket.socket()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        ours.setblocking(False)
        await asyncio.get_running_loop().sock_connect(ours, (self._host, self._port))
        reader, writer = await asyncio.open_connection(sock=ours, limit=2048)
        head = f"POST {route} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(text)}\r\n\r\n"
        cuts = sorted(pick.randrange(len(text)) for _ in range(4))
        pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
        try:
            for piece in [head.encode(), *(pieces[:2] if kind == "cut" else pieces)]:
                writer.write(piece)
                await writer.drain()
                await asyncio.sleep(0.03 if kind == "slow sender" else 0)
            if kind == "deaf reader":
                await reader.read(100)
                await asyncio.sleep(0.3)
            elif kind != "cut":
                answer = b""
                while part := await reader.read(2048):
                    answer += part
                    await asyncio.sleep(0.01 if kind == "slow reader" else 0)
                status = int(answer.split(b" ", 2)[1])
                self.told.statuses[status] += 1
                assert status in (200, FULL), answer
                if status == 200 and kind == "slow reader":  # as chunks: the last one is empty
                    assert answer.endswith(b"0\r\n\r\n"), answer[-200:]
        finally:
            writer.transport.abort()
