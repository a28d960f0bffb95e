"""What a client's constraints, prompts and answers may cost, and that nobody else pays for it."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from hmc.errors import UsageError
from hmc.plan import Plan
from hmc.runtime.tokens.files import TokenizerFiles
from hmc.serve import grammar, prepare
from hmc.serve.grammar import Grammars
from hmc.serve.service import Settings
from hmc.serve.vocabulary import Vocabulary

_WAIT = 60
_ENGINE = ("lexer", "parser", "Parser", "state", "lark", "start:", "verbose", "row")
"""Words of the grammar engine, which say nothing to a client."""


@pytest.fixture(scope="module")
def grammars(model: Path) -> Grammars:
    files = TokenizerFiles.read(model)
    assert files is not None
    return Grammars(Vocabulary(files), 4096, [1])


@pytest.mark.parametrize(
    ("pattern", "why"),
    [
        ("((a{1000}){1000}){1000}", "too complex"),
        ("a{9999999}", "too complex"),
        ("(a?){3000}a{3000}", "too complex"),
        ("(", "unclosed group"),
        ("a[", "unclosed character class"),
        ("(?=a)b", "look-around"),
        ("(a)\\1", "backreferences"),
    ],
)
def test_expressions_are_refused_in_plain_words(grammars: Grammars, pattern: str, why: str) -> None:
    with pytest.raises(UsageError, match=f"the regex cannot be used: .*{why}") as refused:
        grammars.regex(pattern)
    assert not [word for word in _ENGINE if word in str(refused.value)]
    with pytest.raises(UsageError, match=f"the schema cannot be used: .*{why}"):
        grammars.json({"type": "string", "pattern": f"^{pattern}$"})


def test_a_mask_says_what_may_come_from_the_first_token_on(grammars: Grammars) -> None:
    constraint, answers = grammars.regex("[ab]{3}"), list[list[int]]()
    for which in (0, -1):
        mask, answer = grammars.mask(constraint), list[int]()
        while answer[-1:] != [1]:
            answer.append(int(np.flatnonzero(mask(list(answer)))[which]))
        answers.append(answer)
    assert answers[0] != answers[1] and max(map(len, answers)) <= 4


def test_a_step_that_explodes_ends_its_answer(grammars: Grammars) -> None:
    mask = grammars.mask(grammars.regex("(.{1,100}|[a-z]{50,200}){1,300}"))
    rng, answer = np.random.default_rng(0), list[int]()

    def say(tokens: int) -> None:
        for _ in range(tokens):
            answer.append(int(rng.choice(np.flatnonzero(mask(list(answer))))))

    with pytest.raises(UsageError, match="constraint cannot be used: it is too complex"):
        say(300)


def test_an_answer_may_take_so_much_time_for_its_masks(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter(range(1000))
    monkeypatch.setattr(time, "thread_time", lambda: next(clock))
    mask = grammars.mask(grammars.regex("a*"))
    token = int(np.flatnonzero(mask([]))[-1])
    mask([token])
    mask([token] * 2)
    with pytest.raises(UsageError, match="too complex"):
        mask([token] * 3)


def test_what_is_not_compiled_in_time_is_refused(
    grammars: Grammars, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = threading.Event()

    def slow(*_: Any) -> None:
        held.wait(_WAIT)

    monkeypatch.setattr(grammar, "_COMPILE_SECONDS", 0.05)
    monkeypatch.setattr(grammars, "_compile", slow)
    with pytest.raises(UsageError, match=r"was not compiled within 0.05 s"):
        grammars.regex("a")
    held.set()


def test_a_nasty_constraint_is_a_400_and_holds_nobody_up(live: Any) -> None:
    body = {"model": "tiny", "prompt": "And", "max_tokens": 8, "temperature": 0}
    nasty = {**body, "structured_outputs": {"regex": "((a{1000}){1000}){1000}"}}
    stats = live.service.scheduler.stats
    before = stats().steps
    answer = httpx.post(f"{live.url}/v1/completions", json=nasty, timeout=_WAIT)
    assert answer.status_code == 400 and "too complex" in answer.json()["error"]["message"]
    assert stats().steps == before  # nothing of it came to the scheduler
    late = {**body, "structured_outputs": {"regex": "(.{1,100}|[a-z]{50,200}){1,300}"}}
    late |= {"max_tokens": 300, "temperature": 2, "seed": 1}
    answer = httpx.post(f"{live.url}/v1/completions", json=late, timeout=_WAIT)
    assert answer.status_code == 400 and "too complex" in answer.json()["error"]["message"]
    assert httpx.post(f"{live.url}/v1/completions", json=body, timeout=_WAIT).status_code == 200


def test_a_place_in_the_queue_comes_before_a_prompt_is_read(
    plan: Plan, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {"model": "tiny", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    held, inside, first = threading.Event(), threading.Event(), prepare.chat

    def slow(*arguments: Any) -> Any:
        inside.set()
        assert held.wait(_WAIT)
        return first(*arguments)

    settings = Settings(name="tiny", max_queue=1, request_seconds=0.0)
    with start(plan, settings) as live:
        live.wait_ready()
        monkeypatch.setattr(prepare, "chat", slow)
        answers: list[httpx.Response] = []
        asking = threading.Thread(
            target=lambda: answers.append(
                httpx.post(f"{live.url}/v1/chat/completions", json=body, timeout=_WAIT)
            )
        )
        asking.start()
        assert inside.wait(_WAIT)
        for route, other in (
            ("v1/chat/completions", body),
            ("v1/completions", {"model": "tiny", "prompt": "x"}),
            ("tokenize", {"model": "tiny", "prompt": "x"}),
        ):
            refused = httpx.post(f"{live.url}/{route}", json=other, timeout=_WAIT)
            assert refused.status_code == 429 and refused.headers["retry-after"]
        held.set()
        asking.join(_WAIT)
        assert answers[0].status_code == 200


def test_a_request_has_its_time(plan: Plan, start: Callable[..., Any]) -> None:
    body = {"model": "tiny", "prompt": "x", "max_tokens": 900, "ignore_eos": True}
    with start(plan, Settings(name="tiny", request_seconds=0.02)) as live:
        live.wait_ready()
        whole = httpx.post(f"{live.url}/v1/completions", json=body, timeout=_WAIT)
        assert whole.status_code == 504 and whole.headers["x-should-retry"] == "false"
        assert whole.json()["error"]["code"] == "request_timeout"
        streamed = httpx.post(
            f"{live.url}/v1/completions", json={**body, "stream": True}, timeout=_WAIT
        )
        assert "request_timeout" in streamed.text and "[DONE]" not in streamed.text
        metrics = httpx.get(f"{live.url}/metrics").text
        assert re.search(r'hmc_requests_total{.*reason="error".*} 2.0', metrics)
        assert "hmc_preemptions_total" in metrics
        assert live.service.scheduler.stats().kv_used == 0
