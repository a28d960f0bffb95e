"""The server with a prefill process beside it: what it answers, tells and survives."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from hmc.cli import cli
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError
from hmc.plan import Plan, save_plan
from hmc.runtime.prefill.disaggregation import Decision, Division
from hmc.runtime.prefill.worker import PrefillWorker
from hmc.serve import server
from hmc.serve.service import Settings

CPUS = tuple(sorted(os.sched_getaffinity(0)))
DECISION = Decision(Division(CPUS[:1], CPUS[-1:]), "prefill process: on, for this test")
WAIT = 60.0


@pytest.fixture(scope="module")
def chunked(model: Path) -> Plan:
    return compile_plan(model, threads=2, max_context=512, max_chunk=16)


@pytest.fixture(scope="module")
def beside(chunked: Plan, start: Callable[..., Any]) -> Iterator[Any]:
    settings = Settings(name="tiny", prefill=DECISION, watchdog_seconds=60)
    with start(chunked, settings) as found:
        found.wait_ready()
        yield found


def ask(tokens: int) -> dict[str, Any]:
    prompt = [tokens, *(3 + 7 * i % 900 for i in range(1, tokens))]  # no prefix of another one
    return {"model": "tiny", "prompt": prompt, "max_tokens": 8, "temperature": 0}


def answer(url: str, tokens: int) -> str:
    reply = httpx.post(f"{url}/v1/completions", json=ask(tokens), timeout=WAIT)
    assert reply.status_code == 200, reply.text
    return str(reply.json()["choices"][0]["text"])


def process(url: str) -> dict[str, Any]:
    health = httpx.get(f"{url}/health")
    assert health.status_code == 200
    found: dict[str, Any] = health.json()["prefill_process"]
    return found


def test_answers_are_those_of_one_process(
    beside: Any, chunked: Plan, start: Callable[..., Any]
) -> None:
    found = [answer(beside.url, tokens) for tokens in (400, 9, 250)]
    with start(chunked, Settings(name="tiny")) as one:
        one.wait_ready()
        assert [answer(one.url, tokens) for tokens in (400, 9, 250)] == found
        assert "prefill_process" not in httpx.get(f"{one.url}/health").json()
        assert httpx.get(f"{one.url}/live").json()["prefill"]["process"] is None


def test_health_live_and_metrics_tell_of_the_process(beside: Any) -> None:
    state = process(beside.url)
    assert state["alive"] and state["ready"] and state["prompts"] == 0
    assert Path(f"/proc/{state['pid']}").exists() and state["pid"] != os.getpid()
    told = httpx.get(f"{beside.url}/live").json()["prefill"]
    assert told["decision"] == DECISION.reason
    assert told["process"]["pid"] == state["pid"]
    metrics = httpx.get(f"{beside.url}/metrics").text
    assert "hmc_prefill_process_up 1.0" in metrics
    assert "hmc_prefill_process_restarts_total 0.0" in metrics


@pytest.mark.slow
def test_a_killed_process_is_replaced(beside: Any) -> None:
    expected, before = answer(beside.url, 350), process(beside.url)
    os.kill(before["pid"], signal.SIGKILL)
    assert answer(beside.url, 349) != ""
    assert answer(beside.url, 350) == expected
    limit = time.monotonic() + WAIT
    while not (now := process(beside.url))["ready"]:
        assert time.monotonic() < limit
        time.sleep(0.05)
    assert now["restarts"] == before["restarts"] + 1 and now["pid"] != before["pid"]


@pytest.mark.slow
def test_a_process_killed_under_load_costs_nobody_an_answer(beside: Any) -> None:
    lengths = [300 + 3 * i for i in range(24)]
    expected, before = [answer(beside.url, tokens) for tokens in lengths[:4]], process(beside.url)
    limit = time.monotonic() + WAIT
    with ThreadPoolExecutor(len(lengths)) as pool:
        answers = [pool.submit(answer, beside.url, tokens) for tokens in lengths]
        while not process(beside.url)["prompts"]:
            assert time.monotonic() < limit
        os.kill(before["pid"], signal.SIGKILL)
        found = [each.result(WAIT) for each in answers]
    assert found[:4] == expected and all(found)
    while (now := process(beside.url))["restarts"] == before["restarts"] or not now["ready"]:
        assert time.monotonic() < limit
        time.sleep(0.05)


@pytest.mark.slow
def test_a_process_that_cannot_begin_ends_the_server(
    chunked: Plan, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> bool:
        raise CapacityError("no memory for it")

    monkeypatch.setattr(PrefillWorker, "wait_ready", refuse)
    with start(chunked, Settings(name="tiny", prefill=DECISION)) as live:
        limit = time.monotonic() + WAIT
        while live.server.models.failure is None:
            assert time.monotonic() < limit
            time.sleep(0.01)
    assert isinstance(live.server.models.failure, CapacityError)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--prefill-process", "off"], "off, as asked for"),
        (["--prefill-process", "on", "--threads", "2", "--prefill-threads", "1"], "1 prefill"),
        (["--prefill-process", "auto", "--threads", "1"], "no, there is one thread"),
    ],
)
def test_the_command_line_decides(
    chunked: Plan,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    told: str,
) -> None:
    if "on" in arguments and len(CPUS) < 2:
        pytest.skip("two cores are divided")
    seen: list[Settings] = []
    monkeypatch.setattr(server, "serve", lambda models, *_: seen.append(models.settings))
    save_plan(chunked, tmp_path / "p.hmp")
    result = CliRunner().invoke(cli, ["serve", str(tmp_path / "p.hmp"), *arguments])
    assert result.exit_code == 0, result.output
    assert told in seen[0].prefill.reason and "\n" not in seen[0].prefill.reason
    assert (seen[0].prefill.division is not None) == ("on" in arguments)


def test_threads_for_a_process_that_is_off_are_refused(chunked: Plan, tmp_path: Path) -> None:
    save_plan(chunked, tmp_path / "p.hmp")
    command = ["serve", str(tmp_path / "p.hmp"), "--prefill-process", "off"]
    result = CliRunner().invoke(cli, [*command, "--prefill-threads", "1"])
    assert result.exit_code != 0
    assert "--prefill-threads" in (str(result.exception) + result.output)
