"""Nothing that one client does is felt by the others, or keeps the server."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from pydantic import ValidationError

from hmc.cli.serve_command import _keys
from hmc.errors import UsageError
from hmc.plan import Plan
from hmc.serve.bodies import CompletionBody
from hmc.serve.hosts import allowed_hosts
from hmc.serve.server import listen_unix
from hmc.serve.service import Settings
from hmc.serve.watch import StepWatch

ASK = {"model": "tiny", "prompt": "And", "max_tokens": 4}
HEAD = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"


def _connect(url: str, sent: str = "") -> socket.socket:
    host, port = url.removeprefix("http://").split(":")
    client = socket.create_connection((host, int(port)), timeout=10)
    client.sendall(sent.encode())
    return client


@pytest.mark.parametrize("wrong", [[1.5] * 9999, [[1.5]] * 9999, [1, 2.5] * 9999, [None] * 9999])
def test_a_list_of_wrong_elements_is_a_few_faults(wrong: list[Any]) -> None:
    with pytest.raises(ValidationError) as caught:
        CompletionBody.model_validate_json(json.dumps({**ASK, "prompt": wrong}))
    assert caught.value.error_count() < 9


def test_hosts_origins_ids_and_the_log(
    plan: Plan, start: Callable[..., Any], capfd: pytest.CaptureFixture[str]
) -> None:
    settings = Settings(
        name="tiny",
        allowed_hosts=("gpu.example",),
        allowed_origins=("https://chat.example",),
        access_log="json",
    )
    with start(plan, settings) as live, httpx.Client(base_url=live.url) as client:
        for host, status in {
            "evil.example": 403,
            "evil.example:8000": 403,
            "127.evil.example": 403,
            "gpu.example:8000": 200,
            "localhost:8000": 200,
            "[::1]:8000": 200,
            "127.0.0.1": 200,
        }.items():
            assert client.get("/version", headers={"Host": host}).status_code == status, host
        asked = {"Access-Control-Request-Method": "POST", "Origin": "https://chat.example"}
        reply = client.options("/v1/chat/completions", headers=asked)
        assert reply.headers["access-control-allow-origin"] == "https://chat.example"
        other = client.options(
            "/v1/completions", headers={**asked, "Origin": "https://evil.example"}
        )
        assert "access-control-allow-origin" not in other.headers
        given = client.get("/version", headers={"X-Request-Id": "mine-1"})
        assert given.headers["x-request-id"] == "mine-1"
        made = client.get("/version", headers={"X-Request-Id": "two words"})
        assert made.headers["x-request-id"].startswith("req-")
        live.wait_ready()
        assert "hmc_build_info{" in client.get("/metrics").text
        live.service.ready()[1]._failure = UsageError("broken")
        assert client.post("/v1/completions", json=ASK).status_code == 503
        live.service.ready = None
        assert client.post("/v1/completions", json=ASK).status_code == 500
    said = capfd.readouterr().err
    lines = [json.loads(line) for line in said.splitlines() if line.startswith("{")]
    found = {entry["id"]: entry for entry in lines}["mine-1"]
    assert (found["method"], found["path"], found["status"]) == ("GET", "/version", 200)
    assert [e["error"] for e in lines if e["status"] == 503 and e["path"] != "/health"] == [
        "broken"
    ]
    assert "NoneType" in next(e["error"] for e in lines if e["status"] == 500)
    assert "is ready after" in said


def test_silent_and_slow_clients_shut_nobody_out_and_do_not_keep_the_server(
    plan: Plan, start: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hmc.serve.connections.most_connections", lambda: 8)
    monkeypatch.setattr("hmc.serve.reading._SECONDS", 0.3)
    body = {"model": "tiny", "prompt": "And", "max_tokens": 1000, "ignore_eos": True, "n": 4}
    with ExitStack() as clients, start(plan, Settings(name="tiny", drain_seconds=0.3)) as live:
        live.wait_ready()
        silent = [clients.enter_context(_connect(live.url)) for _ in range(24)]
        assert httpx.get(f"{live.url}/health", timeout=5).status_code == 200
        assert len(live.server.server_state.connections) <= 8
        assert silent[0].recv(1) == b""
        half = clients.enter_context(_connect(live.url, f"{HEAD}Content-Length: 99\r\n\r\n{{"))
        assert b" 408 " in half.recv(1000).partition(b"\r\n")[0]
        monkeypatch.setattr("hmc.serve.connections.HEAD_SECONDS", 0.1)
        began = clients.enter_context(_connect(live.url, HEAD))
        assert began.recv(1) == b""
        monkeypatch.setattr("hmc.serve.reading._SECONDS", 60.0)
        clients.enter_context(_connect(live.url, f"{HEAD}Content-Length: 99\r\n\r\n{{"))
        text = json.dumps({**body, "stream": True})
        unread = _connect(live.url, f"{HEAD}Content-Length: {len(text)}\r\n\r\n{text}")
        clients.enter_context(unread)
        assert unread.recv(1) == b"H"
        begin = time.monotonic()
    assert time.monotonic() - begin < 5


def test_what_is_sent_waits_for_no_acknowledgement(live: Any) -> None:
    with httpx.Client(base_url=live.url) as client:
        client.get("/health")
        ours = [each.transport for each in live.server.server_state.connections]
        sockets = [each.get_extra_info("socket") for each in ours]
        assert sockets
        for each in sockets:
            assert each.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_a_stopped_process_does_not_hang() -> None:
    watch = StepWatch(limit=6.0, period=1.0)
    hangs = [watch.hangs(float(at), float(at)) for at in range(4)]
    assert not any([*hangs, watch.hangs(1000.0, 1000.0)])  # SIGSTOP after three seconds
    assert [watch.hangs(1000.0 + at, 1000.0 + at) for at in range(1, 5)] == [
        False,
        True,
        True,
        True,
    ]
    assert not watch.hangs(0.5, 1005.0)
    fresh = StepWatch(limit=5.0, period=1.0)
    assert not fresh.hangs(0.0, 0.0) and not fresh.hangs(900.0, 1000.0)


def test_keys_are_never_empty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HMC_API_KEY", "")
    with pytest.raises(UsageError, match="HMC_API_KEY: it is empty"):
        _keys(None, None)
    with pytest.raises(UsageError, match="--api-key: it is empty"):
        _keys(" ", None)
    file = tmp_path / "keys"
    file.write_text("\n")
    with pytest.raises(UsageError, match="there is no key in it"):
        _keys(None, str(file))
    file.write_text("one\n\n two \n")
    assert _keys(None, str(file)) == ("one", "two")
    with pytest.raises(UsageError, match="cannot be read"):
        _keys(None, str(tmp_path / "nowhere"))
    monkeypatch.delenv("HMC_API_KEY")
    assert _keys(None, None) == ()


def test_all_names_are_answered_only_where_others_can_come() -> None:
    assert allowed_hosts("127.0.0.1", ()) == allowed_hosts("localhost", ()) == ()
    assert allowed_hosts("0.0.0.0", ()) == ("*",)
    assert allowed_hosts("0.0.0.0", ("a",)) == allowed_hosts("::1", ("a",)) == ("a",)


def test_a_socket_in_the_file_system(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    somebody = pytest.raises(UsageError, match="somebody else does")
    with listen_unix(path), somebody, listen_unix(path):
        pass
    assert not Path(path).exists()
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(path)
    with listen_unix(path) as again, socket.socket(socket.AF_UNIX) as client:
        client.connect(path)
        again.accept()[0].close()
    with pytest.raises(UsageError, match="cannot listen"), listen_unix(str(tmp_path / "no" / "s")):
        pass
