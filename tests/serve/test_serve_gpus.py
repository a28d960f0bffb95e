"""A live server over a plan for two GPUs, played by the CPU."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from split_plans import split_plan

from hmc.plan.phases import BESIDE
from hmc.serve.service import Settings

LONG = " ".join(["And the king said unto the people that were with him"] * 3)
SHORT = ("And it came to pass", "In those days there was no king")


@pytest.mark.slow
def test_lanes_decode_while_a_prompt_streams(model: Path, start: Callable[..., Any]) -> None:
    plan = split_plan(model, gpus=2, held=0.5, switches=True, max_context=512)
    with start(plan, Settings(name="tiny", devices="host", threads=2)) as live:
        live.wait_ready()
        executor = live.service._opened.engine.executor
        began = threading.Barrier(3)
        answers: dict[str, str] = {}

        def ask(prompt: str, tokens: int, first: bool) -> None:
            body = {"model": "tiny", "prompt": prompt, "max_tokens": tokens, "temperature": 0}
            text = ""
            with httpx.stream(
                "POST", f"{live.url}/v1/completions", json=body | {"stream": True}, timeout=120
            ) as reply:
                for line in reply.iter_lines():
                    if line.startswith("data: {") and first:
                        began.wait(60)
                        first = False
                    text += line
            answers[prompt] = text

        threads = [threading.Thread(target=ask, args=(each, 40, True)) for each in SHORT]
        for thread in threads:
            thread.start()
        began.wait(60)  # both decode
        ask(LONG, 4, False)
        for thread in threads:
            thread.join(120)
        assert set(answers) == {LONG, *SHORT}
        assert all(text.endswith("data: [DONE]") for text in answers.values())
        assert executor.calls[BESIDE] == 1
        assert executor.calls["decode.dual"] > 0
        assert executor.kv.allocator.used == 0
        assert any("native program" in told for told in live.service._told)
