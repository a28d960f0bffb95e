"""Several plans behind one server: when each is loaded and unloaded, what waits for that, and what
of memory and threads is left.
"""

from __future__ import annotations

import gc
import json
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from click.testing import CliRunner

from hmc.cli import cli
from hmc.compiler import compile as compile_plan
from hmc.errors import CapacityError, ExecutionError, ShardError
from hmc.machine.detect import load_machine
from hmc.plan import Plan, save_plan
from hmc.serve import progress, room, server, service
from hmc.serve.models import Model, Models
from hmc.serve.progress import Progress
from hmc.serve.room import Needs, lacking
from hmc.serve.service import Settings

WAIT = 60.0
ASK = {"prompt": "And the king said unto", "max_tokens": 8, "temperature": 0}
Several = Callable[..., Any]


@pytest.fixture(scope="session")
def several(plan: Plan, serve: Callable[..., Any]) -> Several:
    """`several("ab", preload=(), **settings)`: a live server of the same plan under these names."""

    @contextmanager
    def run(names: str, preload: tuple[str, ...] = (), **settings: Any) -> Iterator[Any]:
        base = Settings(name="", keep_alive_seconds=0.1, **settings)
        with serve(Models([Model(plan, replace(base, name=n)) for n in names], preload)) as live:
            yield live

    return run


def complete(url: str, name: str, **more: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/completions", json={"model": name, **ASK, **more}, timeout=WAIT)


def states(url: str) -> dict[str, str]:
    listed = httpx.get(f"{url}/v1/models").json()["data"]
    return {each["id"]: each["status"]["value"] for each in listed}


def until(true: Callable[[], bool]) -> None:
    limit = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < limit
        time.sleep(0.01)


@contextmanager
def busy(found: Any, name: str) -> Iterator[None]:
    """One request is being answered by a model for the length of a `with`."""
    assert complete(found.url, name).status_code == 200
    model, go_on, inside = found.server.models.find(name), threading.Event(), threading.Event()
    engine, _ = model.service.ready()
    decode = engine.executor.decode

    def held(*arguments: Any) -> Any:
        inside.set()
        assert go_on.wait(WAIT)
        return decode(*arguments)

    engine.executor.decode = held
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(complete, found.url, name)
        assert inside.wait(WAIT)
        try:
            yield
        finally:
            go_on.set()
        assert answer.result(WAIT).status_code == 200
    until(lambda: not model.users)


class Gate:
    """Between the server and its engines: those of the plans named `held` wait for `open`, those of
    `broken` fail with their error.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held: set[str] = set()
        self.broken: dict[str, Exception] = {}
        self.open, self.reached = threading.Event(), threading.Event()
        real = service.Service._open

        def opened(one: service.Service, stack: Any) -> Any:
            name = one.settings.name
            if name in self.held:
                one._progress("reading weights", 1, 4)
                self.reached.set()
                assert self.open.wait(WAIT)
            if name in self.broken:
                raise self.broken[name]
            return real(one, stack)

        monkeypatch.setattr(service.Service, "_open", opened)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Gate:
    return Gate(monkeypatch)


def test_a_model_is_loaded_when_it_is_named_and_the_one_unused_longest_makes_room(
    several: Several, live: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    expected = complete(live.url, "tiny").json()["choices"]
    with several("abc", most_loaded=2, access_log="text") as found:
        url = found.url
        health = httpx.get(f"{url}/health")
        assert health.status_code == 200 and health.json()["status"] == "ready"
        assert health.json()["models"] == {name: {"value": "unloaded"} for name in "abc"}
        for name in "ab":
            answer = complete(url, name).json()
            assert answer["choices"] == expected and answer["model"] == name
        assert complete(url, "a").status_code == 200  # b is now unused for longer
        assert complete(url, "c").json()["choices"] == expected
        assert states(url) == {"a": "loaded", "b": "unloaded", "c": "loaded"}
        assert httpx.get(f"{url}/v1/models/c").json()["status"] == {"value": "loaded"}

        other = complete(url, "d")
        assert other.status_code == 404 and "'a', 'b', 'c' are" in other.json()["error"]["message"]
        unnamed = httpx.post(f"{url}/v1/completions", json=ASK)
        assert unnamed.status_code == 400 and unnamed.json()["error"]["code"] == "model_required"
        ids = httpx.post(f"{url}/tokenize", json={"model": "a", "prompt": "And"})
        assert (
            ids.json()["tokens"]
            == httpx.post(f"{live.url}/tokenize", json={"prompt": "And"}).json()["tokens"]
        )

        assert httpx.get(f"{url}/live?model=c").json()["scheduler"]["tokens_generated"] == 8
        assert httpx.get(f"{url}/live?model=b").json()["state"] == "unloaded"
        assert httpx.get(f"{url}/live/plan?model=b").json()["name"] == "b"
        assert httpx.get(f"{url}/live/steps?model=b").json() == {"steps": 0, "recent": []}
        assert httpx.get(f"{url}/live").status_code == 400
        figures = httpx.get(f"{url}/metrics").text
        for line in (
            'hmc_model_loaded{model_name="b"} 0.0',
            'hmc_model_unloads_total{model_name="b"} 1.0',
            'hmc_generated_tokens_total{model_name="c"} 8.0',
            'hmc_requests_total{model_name="c",reason="length"} 1.0',
            'hmc_request_seconds_count{model_name="a"} 2.0',
            "hmc_ready 1.0",
        ):
            assert line in figures, line
        assert 'hmc_running{model_name="b"}' not in figures
    said = capfd.readouterr().err
    assert "hmc: b is unloaded: c takes its place" in said and "hmc: c is ready after" in said
    assert re.search(r'"POST /v1/completions" 200 \S+ \S+ req-\w+ c\n', said)


def test_one_plan_says_what_it_always_said(live: Any) -> None:
    complete(live.url, "tiny")
    figures = httpx.get(f"{live.url}/metrics").text
    assert "model_name" not in figures and re.search(r"^hmc_running 0\.0$", figures, re.M)
    assert "hmc_model_loaded 1.0" in figures
    assert httpx.get(f"{live.url}/live").json()["state"] == "ready"
    assert httpx.get(f"{live.url}/health").json() == {
        "status": "ready",
        "models": {"tiny": {"value": "loaded"}},
    }


@pytest.mark.slow
def test_what_is_in_use_keeps_its_memory_and_who_needs_it_waits(
    several: Several, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_limit", lambda: round(1.5 * plan.ledger_totals["host"]))
    with several("ab", load_seconds=0.4) as found:
        with busy(found, "a"):
            late = complete(found.url, "b")
            assert late.status_code == 503 and int(late.headers["retry-after"]) > 0
            fault = late.json()["error"]
            assert fault["code"] == "memory_in_use"
            assert "not loaded within 0.4 s: b waits for a, in use" in fault["message"]
            assert states(found.url)["a"] == "loaded"
        models = found.server.models
        models.settings = replace(models.settings, load_seconds=WAIT)
        assert complete(found.url, "b").status_code == 200
        assert states(found.url) == {"a": "unloaded", "b": "loaded"}


def test_while_a_model_loads_others_answer_and_its_stream_is_kept_alive(
    several: Several, gate: Gate
) -> None:
    gate.held = {"b"}
    with several("ab", preload=("a",)) as found, ThreadPoolExecutor(1) as pool:
        until(lambda: states(found.url)["a"] == "loaded")
        waiting: Future[httpx.Response] = pool.submit(complete, found.url, "b")
        body = {"model": "b", **ASK, "stream": True}
        with httpx.stream("POST", f"{found.url}/v1/completions", json=body, timeout=WAIT) as reply:
            lines = reply.iter_lines()
            assert reply.headers["content-type"].startswith("text/event-stream")
            assert [next(lines) for _ in range(4)] == [": loading", ""] * 2
            assert complete(found.url, "a").status_code == 200
            health = httpx.get(f"{found.url}/health").json()
            assert health["status"] == "ready"
            assert health["models"]["b"]["value"] == "loading"
            assert health["models"]["b"]["progress"] == 0.25
            assert httpx.get(f"{found.url}/live?model=b").json()["state"] == "loading"
            gate.open.set()
            events = [line for line in lines if line.startswith("data: ")]
        assert events[-1] == "data: [DONE]"
        streamed = [json.loads(event[6:])["choices"][0]["text"] for event in events[:-1]]
        assert "".join(streamed) == waiting.result(WAIT).json()["choices"][0]["text"]


@pytest.mark.slow
def test_a_failure_to_load_ends_who_waits_for_it_and_not_the_server(
    several: Several, gate: Gate, capfd: pytest.CaptureFixture[str]
) -> None:
    gate.held, gate.broken = {"b"}, {"b": ShardError("model.safetensors is gone")}
    with several("ab") as found:
        body = {"model": "b", **ASK, "stream": True}
        with httpx.stream("POST", f"{found.url}/v1/completions", json=body, timeout=WAIT) as reply:
            lines = reply.iter_lines()
            assert next(lines) == ": loading"
            gate.open.set()
            events = [json.loads(line[6:]) for line in lines if line.startswith("data: ")]
        assert [each["error"]["code"] for each in events] == ["load_failed"]
        again = complete(found.url, "b")
        assert again.status_code == 500
        message = "b cannot be loaded: model.safetensors is gone"
        assert again.json()["error"]["message"] == message
        status = httpx.get(f"{found.url}/v1/models/b").json()["status"]
        why = "model.safetensors is gone"
        assert status == {"value": "unloaded", "failed": True, "reason": why}
        assert complete(found.url, "a").status_code == 200
        gate.broken.clear()
        assert complete(found.url, "b").status_code == 200
        assert httpx.get(f"{found.url}/v1/models/b").json()["status"] == {"value": "loaded"}
    assert capfd.readouterr().err.count(f"hmc: {message}") == 2


@pytest.mark.slow
def test_memory_that_turns_out_too_small_is_that_of_the_idle(several: Several, gate: Gate) -> None:
    with several("ab") as found:
        assert complete(found.url, "a").status_code == 200
        gate.broken = {"b": CapacityError("2 GiB are needed")}
        assert complete(found.url, "b").status_code == 500
        assert states(found.url) == {"a": "unloaded", "b": "unloaded"}


def test_a_client_that_does_not_wait_for_memory_leaves_no_load_behind(
    several: Several, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(room, "memory_limit", lambda: round(1.5 * plan.ledger_totals["host"]))
    with several("ab") as found:
        b = found.server.models.find("b")
        with busy(found, "a"):
            url, body = f"{found.url}/v1/completions", {"model": "b", **ASK}
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(url, json=body, timeout=0.2)
            with httpx.stream("POST", url, json={**body, "stream": True}, timeout=WAIT) as reply:
                assert next(reply.iter_lines()) == ": loading"
            until(lambda: not b.users and b.opening is None)
        assert states(found.url) == {"a": "loaded", "b": "unloaded"}


def test_who_waits_for_a_model_is_refused_when_the_server_ends(
    several: Several, gate: Gate
) -> None:
    gate.held = {"a"}
    with ThreadPoolExecutor(1) as pool:
        with several("ab") as found:
            waiting = pool.submit(complete, found.url, "a")
            assert gate.reached.wait(WAIT)
            found.server.stop()
            assert waiting.result(WAIT).status_code == 503
        gate.open.set()
    assert waiting.result().json()["error"]["code"] == "draining"


@pytest.mark.slow
def test_what_has_failed_is_loaded_anew_where_there_are_others(
    several: Several, capfd: pytest.CaptureFixture[str]
) -> None:
    with several("ab") as found:
        assert complete(found.url, "a").status_code == 200
        model = found.server.models.find("a")
        model.service.scheduler.abandon(ExecutionError("the device is gone"))
        assert complete(found.url, "a").status_code == 503
        until(lambda: model.unloads == 1 and not model.loaded)
        assert httpx.get(f"{found.url}/health").status_code == 200
        assert complete(found.url, "a").status_code == 200
    assert "hmc: a is unloaded: it has failed: the device is gone" in capfd.readouterr().err


def anonymous_bytes() -> int:
    found = re.search(r"^RssAnon:\s*(\d+) kB", Path("/proc/self/status").read_text(), re.M)
    assert found
    return 1024 * int(found[1])


def test_what_is_idle_gives_everything_back(
    plan: Plan, serve: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(name="tiny", home="arena", idle_seconds=0.2)
    weights = sum(item.bytes for item in plan.ledger if item.detail == "weights")
    with serve(Models([Model(plan, settings)])) as live:
        model = live.server.models.only
        live.wait_ready()
        use = live.server.models.use(model)
        assert complete(live.url, "tiny").status_code == 200
        loaded, threads = anonymous_bytes(), len(os.listdir("/proc/self/task"))
        executor = model.service._opened.engine.executor
        parts = [weakref.ref(each) for each in (executor, executor.pool, executor._parts.jit)]
        workers, before = executor.pool.workers, model.loads
        del executor
        capfd.readouterr()
        use.end()
        until(lambda: not model.loaded and "is unloaded: it has been" in capfd.readouterr().err)
        assert anonymous_bytes() < loaded - 0.9 * weights
        assert len(os.listdir("/proc/self/task")) <= threads - workers
        until(lambda: gc.collect() >= 0 and not any(part() for part in parts))
        assert httpx.get(f"{live.url}/health").json()["status"] == "ready"
        assert complete(live.url, "tiny").status_code == 200
        assert model.loads == before + 1


def test_the_line_of_options_says_which_models_there_are(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("a", "b", "deeper/a"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_plan(plan, tmp_path / f"{name}.hmp")
    seen: list[Models] = []
    monkeypatch.setattr(server, "serve", lambda models, *_: seen.append(models))

    def run(*arguments: str) -> str:
        result = CliRunner().invoke(cli, ["serve", *arguments, "--prefill-process", "off"])
        return str(result.exception or "") + result.output

    a, b, other = (str(tmp_path / f"{name}.hmp") for name in ("a", "b", "deeper/a"))
    assert run(a, b, "--idle-unload", "1.5m", "--preload", "b", "--models-max", "1") == ""
    assert [model.name for model in seen[0]] == ["a", "b"]
    assert (seen[0].settings.idle_seconds, seen[0].settings.load_seconds) == (90.0, 300.0)
    assert run(a, "--name", "mine") == "" and seen[1].find("mine") is seen[1].only
    assert f"{a} and {other} are both called a" in run(a, other)
    assert "--name mine: there are several plans" in run(a, b, "--name", "mine")
    assert "--checkpoint" in run(a, b, "--checkpoint", str(tmp_path))
    assert "--preload c: there are a, b" in run(a, b, "--preload", "c")
    assert "more than 0" in run(a, "--load-timeout", "0")
    assert "'soon' is no time, such as 90s" in run(a, "--idle-unload", "soon")


def test_what_a_plan_needs_is_counted_by_device(
    model: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch
) -> None:
    mapped, own = (Needs.of(plan, Settings(name="a", home=home)) for home in ("mapped", "arena"))
    weights = sum(item.bytes for item in plan.ledger if item.detail == "weights")
    assert mapped.total == own.total == plan.ledger_totals
    assert own.anew - mapped.anew == weights > 0
    monkeypatch.setattr(room, "available_bytes", lambda: mapped.anew)
    assert lacking(plan, own) == lacking(plan, mapped, [mapped]) == ""
    assert "of memory are free" in lacking(plan, own, [mapped])

    divided = compile_plan(model, machine=load_machine("desktop-rtx4090"))
    needs = Needs.of(divided, Settings(name="a"))
    assert needs.total == divided.ledger_totals and "gpu0" in needs.total
    played = Needs.of(divided, Settings(name="a", devices="host"))
    assert played.total == {"host": sum(divided.ledger_totals.values())}
    full = replace(needs, total={"gpu0": divided.machine.memory_of("gpu0")})
    assert lacking(divided, full) == ""
    assert "gpu0 has" in lacking(divided, full, [needs])


def test_loading_is_told_by_the_tenth_and_at_most_once_a_second(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    now = 0.0
    monkeypatch.setattr(progress.time, "monotonic", lambda: now)
    told = Progress("tiny")
    for done in range(101):
        now = 0.25 * done
        told("loading weights", done, 100)
    now += 0.5
    told("compiling kernels", 9, 10)
    lines = capfd.readouterr().err.splitlines()
    assert lines == [f"hmc: tiny is loading: loading weights {n}%" for n in range(10, 101, 10)]
    assert told.told == "tiny is loading: compiling kernels 90%" and told.share == 0.9
