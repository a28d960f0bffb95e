"""Sends a load to a server and times what comes back; hides HTTP."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from hmc.bench.serve.load import Shot, prompt_ids
from hmc.errors import ExecutionError, UsageError

_TIMEOUT = 3600.0


@dataclass(frozen=True)
class Reply:
    """How one request went: seconds to the first and to the last token, tokens of the output; or
    the `error`. Time counts from its arrival, with a limit of concurrency from its sending.
    `stamps` are the seconds since the run began at which its parts came.
    """

    shot: Shot
    begun: float
    ttft: float = 0.0
    total: float = 0.0
    tokens: int = 0
    error: str = ""
    stamps: tuple[float, ...] = ()

    @property
    def tpot(self) -> float | None:
        """Seconds a token after the first; None when there is no second."""
        return (self.total - self.ttft) / (self.tokens - 1) if self.tokens > 1 else None


class Target:
    """A server under test."""

    def __init__(self, url: str, api_key: str | None) -> None:
        """Raises `UsageError` when nobody answers there."""
        self.url = url.rstrip("/").removesuffix("/v1")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        facts = self._get("/live/plan")
        self.model = str(facts["name"])
        self.context = int(facts["max_context"])
        self.vocab = int(facts["vocab"])

    def live(self) -> dict[str, Any]:
        """The scheduler's figures now."""
        return dict(self._get("/live")["scheduler"])

    def steps(self) -> dict[str, Any]:
        """How many steps the scheduler has made, and the times of the latest."""
        return self._get("/live/steps")

    def run(
        self, shots: Sequence[Shot], *, concurrency: int, seed: int, stream: bool = True
    ) -> list[Reply]:
        """Send every request at its time, at most `concurrency` at once (0: no limit). Without
        `stream` an answer comes as a whole: its first token is the last.
        """
        return asyncio.run(self._run(shots, concurrency, seed, stream))

    async def _run(
        self, shots: Sequence[Shot], concurrency: int, seed: int, stream: bool
    ) -> list[Reply]:
        random = np.random.default_rng(seed)
        prompts = [prompt_ids(shot.prompt, self.vocab, random) for shot in shots]
        gate = asyncio.Semaphore(concurrency or len(shots))
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        async with httpx.AsyncClient(
            base_url=self.url, headers=self._headers, timeout=_TIMEOUT, limits=limits
        ) as client:
            began = time.perf_counter()

            async def one(shot: Shot, prompt: list[int]) -> Reply:
                arrival = began + shot.arrival
                await asyncio.sleep(max(0.0, arrival - time.perf_counter()))
                async with gate:
                    sent = time.perf_counter() if concurrency else arrival
                    return await self._one(client, shot, prompt, sent, began, stream)

            return await asyncio.gather(*map(one, shots, prompts))

    async def _one(
        self,
        client: httpx.AsyncClient,
        shot: Shot,
        prompt: list[int],
        sent: float,
        began: float,
        stream: bool,
    ) -> Reply:
        begun = sent - began
        body = {
            "model": self.model,
            "prompt": prompt,
            "max_tokens": shot.output,
            "temperature": 0,
            "ignore_eos": True,
            "stream": stream,
            "return_token_ids": True,
        }
        stamps: list[float] = []
        tokens = 0
        try:
            async with client.stream("POST", "/v1/completions", json=body) as reply:
                if reply.status_code != 200:
                    text = (await reply.aread()).decode("utf-8", "replace")
                    return Reply(shot, begun, error=_message(reply.status_code, text))
                async for line in reply.aiter_lines():
                    if not line.startswith("data: {" if stream else "{"):
                        continue
                    event = json.loads(line.removeprefix("data: "))
                    if "error" in event:
                        return Reply(shot, begun, error=str(event["error"]["message"]))
                    stamps.append(time.perf_counter() - began)
                    tokens += sum(len(choice["token_ids"]) for choice in event["choices"])
        except httpx.HTTPError as error:
            return Reply(shot, begun, error=f"{type(error).__name__}: {error}")
        if not tokens:
            return Reply(shot, begun, error="the answer holds no tokens")
        first, last = stamps[0] - begun, stamps[-1] - begun
        return Reply(shot, begun, first, last, tokens, stamps=tuple(stamps))

    def _get(self, route: str) -> dict[str, Any]:
        try:
            reply = httpx.get(self.url + route, headers=self._headers, timeout=30)
        except httpx.HTTPError as error:
            raise UsageError(f"{self.url}: no server answers: {error}") from error
        if reply.status_code != 200:
            raise UsageError(f"{self.url}{route}: {_message(reply.status_code, reply.text)}")
        return dict(reply.json())


def all_good(replies: Sequence[Reply]) -> Sequence[Reply]:
    """The replies; `ExecutionError` when a request failed."""
    if failed := [reply.error for reply in replies if reply.error]:
        raise ExecutionError(f"a request failed: {failed[0]}")
    return replies


def wait_ready(url: str, alive: Any) -> None:
    """Wait until a server has loaded its model; `alive()` says whether it still runs."""
    while True:
        try:
            if httpx.get(f"{url}/health", timeout=30).status_code == 200:
                return
        except httpx.HTTPError:
            pass  # it may not listen yet, or have ended: the next line knows
        if not alive():
            raise ExecutionError("the server ended before it was ready: see what it says above")
        time.sleep(0.2)


def _message(status: int, text: str) -> str:
    try:
        return f"HTTP {status}: {json.loads(text)['error']['message']}"
    except (ValueError, KeyError, TypeError):
        return f"HTTP {status}"
