"""How a server begins, refuses, fails and ends."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import serving

from hmc.errors import ShardError, WorkerError
from hmc.plan import Plan
from hmc.serve import service
from hmc.serve.service import Settings

ASK = {"model": "tiny", "prompt": "And", "max_tokens": 4}
LONG = {"model": "tiny", "prompt": "And", "max_tokens": 1000, "ignore_eos": True, "stream": True}


def test_while_loading_health_tells_the_progress_and_a_failure_ends_the_server(
    monkeypatch: pytest.MonkeyPatch, plan: Plan, start: Callable[..., Any]
) -> None:
    go_on = threading.Event()

    def load(*_: Any, progress: Callable[[str, int, int], None], **__: Any) -> None:
        progress("reading weights", 1, 4)
        go_on.wait(20)
        raise ShardError("model.safetensors is gone")

    monkeypatch.setattr(service, "Disaggregated", load)
    with start(plan, Settings(name="tiny")) as live:
        time.sleep(0.1)
        health = httpx.get(f"{live.url}/health")
        assert health.status_code == 503
        assert health.json()["progress"] == 0.25 and "reading weights" in health.json()["reason"]
        reply = httpx.post(f"{live.url}/v1/completions", json=ASK)
        assert reply.status_code == 503 and reply.json()["error"]["code"] == "loading"
        assert httpx.get(f"{live.url}/live").json()["state"] == "loading"
        go_on.set()
        until = time.monotonic() + 10
        while live.server.models.failure is None and time.monotonic() < until:
            time.sleep(0.01)
        assert live.server.should_exit
    assert isinstance(live.server.models.failure, ShardError)


def test_key_size_type_route_and_queue_are_checked(plan: Plan, start: Callable[..., Any]) -> None:
    settings = Settings(name="tiny", api_keys=("old", "s3cret"), max_body_bytes=2000, max_queue=1)
    with start(plan, settings) as live:
        live.wait_ready()
        with httpx.Client(base_url=live.url) as client:
            for headers in ({}, {"Authorization": "Bearer no"}, {"Authorization": b"Bearer \xe9"}):
                for route in ("/v1/models", "/metrics", "/live", "/version"):
                    reply = client.get(route, headers=headers)  # type: ignore[arg-type]
                    assert reply.status_code == 401, route
                    assert reply.json()["error"]["code"] == "invalid_api_key"
            assert client.get("/health").status_code == client.get("/").status_code == 200
            client.headers["Authorization"] = "Bearer s3cret"
            assert client.get("/v1/models").json()["data"][0]["id"] == "tiny"
            assert set(client.get("/version").json()) == {"version"}
            assert client.post("/v1/completions", json=ASK).status_code == 200
            large = client.post("/v1/completions", json={**ASK, "prompt": "x" * 3000})
            assert large.status_code == 413
            assert client.post("/v1/completions", content=json.dumps(ASK)).status_code == 415
            assert client.get("/nowhere").json()["error"]["message"] == "no such route: /nowhere"
            assert client.get("/v1/completions").status_code == 405
            never = client.post("/v1/completions", json={**ASK, "n": 2})
            assert never.status_code == 400 and "--max-queue" in never.text

            def send(_: int) -> httpx.Response:
                return client.post("/v1/completions", json={**LONG, "stream": False}, timeout=60)

            with ThreadPoolExecutor(6) as pool:
                replies = list(pool.map(send, range(6)))
            full = [reply for reply in replies if reply.status_code == 429]
            assert 0 < len(full) < 6 and {r.status_code for r in replies} == {200, 429}
            assert int(full[0].headers["retry-after"]) > 0
            assert full[0].json()["error"]["code"] == "queue_full"
            metrics = client.get("/metrics").text
            count = f'hmc_http_requests_total{{route="/v1/completions",status="429"}} {len(full)}.0'
            assert count in metrics
            assert "hmc_kv_blocks_total" in metrics and "hmc_ready 1.0" in metrics


def test_a_step_that_hangs_fails_its_requests_and_turns_health(
    plan: Plan, start: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(name="tiny", watchdog_seconds=0.6, keep_alive_seconds=0.1)
    with start(plan, settings) as live:
        live.wait_ready()
        engine, _ = live.service.ready()
        release = threading.Event()
        engine.executor.decode = lambda *_: release.wait(20)
        url = f"{live.url}/v1/completions"
        with httpx.stream("POST", url, json={**LONG, "max_tokens": 9}) as reply:
            lines = [line for line in reply.iter_lines() if line]
        assert ": keep-alive" in lines
        assert "more than 0.6 s" in json.loads(lines[-1].removeprefix("data: "))["error"]["message"]
        health = httpx.get(f"{live.url}/health")
        assert health.status_code == 503
        assert health.json()["status"] == "unhealthy" and "0.6 s" in health.json()["reason"]
        assert httpx.post(url, json=ASK).status_code == 503
        release.set()
    said = capfd.readouterr().err
    assert said.count("its stream ends with an error: a step has been running") == 1
    assert said.count("what the threads do") == 1 and "batching/batch.py" in said


def test_sigterm_finishes_what_has_been_accepted(plan_path: Path, live: Any) -> None:
    with serving(plan_path) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        assert process.wait(20) == 0
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_a_client_that_never_finishes_its_question_does_not_keep_the_server(
    plan: Plan, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmc.serve.server._CLIENT_SECONDS", 0.2)
    with start(plan, Settings(name="tiny")) as live:
        live.wait_ready()
        host, port = live.url.removeprefix("http://").split(":")
        client = socket.create_connection((host, int(port)))
        head = (
            "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        )
        client.sendall(f"{head}Content-Length: 1000\r\n\r\n{{".encode())
        time.sleep(0.2)
    with client:  # the server has ended: `start` waits half a minute for that
        assert client.recv(1) == b""


HUNG = f"""
import ctypes, sys
sys.path.insert(0, {str(Path(__file__).parents[1] / "runtime")!r})
import test_pool as t
from hmc.cli import main
from hmc.codegen.jit import Jit
from hmc.runtime.executor import Executor
from hmc.runtime.host import pool

pool._LEAVE_SECONDS = pool._JOIN_SECONDS = 0.3
t.ARGS.update(t.TEST_ARGS)
jit, word = Jit({{**t.EMITTERS, "test_hang": t.emit_hang}}), ctypes.c_int64()
builder = t.ProgramBuilder()
builder.add(t.kernel(jit, "test_hang"), t.words(ctypes.addressof(word)), tag=0)
records = builder.build().records
Executor.decode = lambda self, *_: self.pool.run(records)
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_sigterm_ends_a_server_whose_native_program_hangs(plan_path: Path, live: Any) -> None:
    """Nobody ever frees the worker."""
    with serving(plan_path, "--watchdog", "3", program=("-c", HUNG)) as (process, url):
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply:
            lines = reply.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            assert "more than 3 s" in [line for line in lines if line][-1]
        said = process.communicate(timeout=30)[1].splitlines()
    assert process.returncode == WorkerError.exit_code
    assert said[-1] == "hmc: error: a step has been running for more than 3 s"


@pytest.mark.slow
def test_a_second_signal_ends_at_once(plan_path: Path, live: Any) -> None:
    with (
        serving(plan_path) as (process, url),
        httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as reply,
    ):
        next(reply.iter_lines())
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
        assert process.wait(10) in (128 + signal.SIGTERM, 128 + signal.SIGINT)


@pytest.mark.slow
def test_errors_of_startup_are_one_line(plan_path: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "hmc", "serve", *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        busy = run(str(plan_path), "--port", str(taken.getsockname()[1]))
    assert busy.returncode == 2 and busy.stderr.startswith("hmc: error: cannot listen on")
    assert busy.stderr.count("\n") == 1
    gone = run(str(plan_path), "--port", "0", "--checkpoint", str(tmp_path / "nowhere"))
    assert gone.returncode > 2
    assert [line.startswith("hmc: error: ") for line in gone.stderr.splitlines()] == [
        False,
        False,
        True,
    ]
    (tmp_path / "no.hmp").write_text("nothing")
    assert run(str(tmp_path / "no.hmp")).returncode == 5
