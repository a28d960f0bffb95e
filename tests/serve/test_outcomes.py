"""What a server under load makes of what befalls it from outside: signals, files and descriptors
that are gone. The table in docs/serving.md says the same in words.
"""

from __future__ import annotations

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
from processes import SECONDS, idle, metric, serving, wait_for

from hmc.compiler import compile as compile_plan
from hmc.plan import save_plan

CLIENTS = 64
ASK = {"model": "tiny", "prompt": "And", "max_tokens": 40, "ignore_eos": True, "temperature": 0}


@pytest.fixture
def client() -> Iterator[httpx.Client]:
    """One for all threads, which keeps its connections."""
    with httpx.Client(timeout=SECONDS, limits=httpx.Limits(max_connections=CLIENTS)) as found:
        yield found


def stream(client: httpx.Client, url: str, body: dict[str, Any] = ASK) -> str:
    """The text of a stream that ended as it should; "cut off" of one that did not end."""
    text, last = "", ""
    try:
        route = f"{url}/v1/completions"
        with client.stream("POST", route, json={**body, "stream": True}) as reply:
            assert reply.status_code == 200, reply.read()
            for line in reply.iter_lines():
                if line.startswith("data: {"):
                    text += json.loads(line.removeprefix("data: "))["choices"][0]["text"]
                last = line or last
    except httpx.RemoteProtocolError:
        return "cut off"
    assert last == "data: [DONE]", last
    return text


def crowd(
    pool: ThreadPoolExecutor, client: httpx.Client, url: str, body: dict[str, Any] = ASK
) -> list[Future[str]]:
    """As many streams as there may be clients, at once."""
    return [pool.submit(stream, client, url, body) for _ in range(CLIENTS)]


def accepted(url: str) -> float:
    """Requests that a server has on their way."""
    return sum(metric(url, f"hmc_{name}") for name in ("running", "prefilling", "waiting"))


def texts(streams: Sequence[Future[str]]) -> set[str]:
    """Their different texts."""
    return {each.result(SECONDS) for each in streams}


@pytest.mark.slow
def test_sigterm_under_load_answers_all_that_was_accepted(
    plan_path: Path, client: httpx.Client
) -> None:
    with serving(plan_path) as (process, url), ThreadPoolExecutor(CLIENTS) as pool:
        alone = stream(client, url, {**ASK, "max_tokens": 200})
        streams = crowd(pool, client, url, {**ASK, "max_tokens": 200})
        wait_for(lambda: accepted(url) == CLIENTS)
        process.terminate()
        assert texts(streams) == {alone}
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")
        assert process.wait(SECONDS) == 0


@pytest.mark.slow
def test_sigterm_under_load_cuts_off_what_is_too_long(
    plan_path: Path, client: httpx.Client
) -> None:
    with (
        serving(plan_path, "--drain-seconds", "0.5") as (process, url),
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        streams = crowd(pool, client, url, {**ASK, "max_tokens": 1000})
        wait_for(lambda: accepted(url) == CLIENTS)
        process.terminate()
        said = process.communicate(timeout=SECONDS)[1]
        assert "cut off" in texts(streams)
    assert process.returncode == 0
    assert "what has not been answered 0.5 s after the signal is cut off" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_a_checkpoint_deleted_under_the_server_is_missed_when_it_is_loaded_again(
    model: Path, tmp_path: Path, client: httpx.Client
) -> None:
    copy, path = tmp_path / "tiny", tmp_path / "tiny.hmp"
    shutil.copytree(model, copy)
    save_plan(compile_plan(copy, threads=2), path)
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Who?"}], "max_tokens": 20}
    chat |= {"response_format": {"type": "json_object"}, "temperature": 0}
    with (
        serving(path, "--idle-unload", "3s") as (process, url),
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        before = stream(client, url)
        streams = crowd(pool, client, url)
        shutil.rmtree(copy)
        assert texts(streams) == {before} == {stream(client, url)}
        assert client.post(f"{url}/v1/chat/completions", json=chat).status_code == 200
        assert client.post(f"{url}/tokenize", json={"model": "tiny", "prompt": "And"}).json()[
            "count"
        ]
        wait_for(
            lambda: client.get(f"{url}/v1/models").json()["data"][0]["status"]["value"] != "loaded"
        )
        for _ in range(2):
            reply = client.post(f"{url}/v1/completions", json=ASK)
            assert reply.status_code == 500 and reply.json()["error"]["code"] == "load_failed"
            assert str(copy) in reply.json()["error"]["message"]
        process.terminate()
        said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0 and "Traceback" not in said, said


@pytest.mark.slow
def test_a_checkpoint_that_shrinks_in_place_ends_the_server(
    model: Path, tmp_path: Path, client: httpx.Client
) -> None:
    """By SIGBUS, with a line that says so: no answer is made of bytes that are not there."""
    copy, path = tmp_path / "tiny", tmp_path / "tiny.hmp"
    shutil.copytree(model, copy)
    save_plan(compile_plan(copy, threads=2), path)
    with serving(path) as (process, url):
        stream(client, url)
        for shard in copy.glob("*.safetensors"):
            os.truncate(shard, 4096)
        with pytest.raises(httpx.TransportError):
            client.post(f"{url}/v1/completions", json=ASK)
        said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == -signal.SIGBUS
    assert "Fatal Python error: Bus error" in said


@pytest.fixture
def little_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where there may be one."""
    folder = tmp_path / "little"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_a_cache_on_a_full_disk_is_said_once(
    plan_path: Path, little_disk: Path, client: httpx.Client
) -> None:
    (little_disk / "full").write_bytes(bytes(256 << 10))
    environment = {**os.environ, "HMC_CACHE": str(little_disk / "cache")}
    with serving(plan_path, env=environment) as (process, url):
        assert stream(client, url)
        process.terminate()
        said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0 and "Traceback" not in said, said
    assert len([line for line in said.splitlines() if str(little_disk) in line]) == 1, said


@pytest.mark.slow
def test_a_log_on_a_full_disk_is_felt_by_nobody(plan_path: Path, tmp_path: Path) -> None:
    socket = tmp_path / "s"
    command = [sys.executable, "-m", "hmc", "serve", str(plan_path), "--access-log", "json"]
    with (
        open("/dev/full", "w") as full,
        subprocess.Popen([*command, "--unix-socket", str(socket)], stderr=full) as process,
        httpx.Client(
            transport=httpx.HTTPTransport(uds=str(socket)), base_url="http://localhost"
        ) as client,
    ):
        try:
            wait_for(socket.exists)
            wait_for(lambda: client.get("/health").status_code == 200)
            for _ in range(5):
                assert client.post("/v1/completions", json=ASK).status_code == 200
            figures = client.get("/metrics").text.splitlines()
            lost = [line for line in figures if line.startswith("hmc_log_lines_lost_total ")]
            assert float(lost[0].split()[1]) >= 5
            process.terminate()
            assert process.wait(SECONDS) == 0
        finally:
            process.kill()


@pytest.mark.slow
def test_more_clients_than_descriptors_are_all_answered(
    plan_path: Path, client: httpx.Client
) -> None:
    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (CLIENTS, CLIENTS))

    with (
        serving(plan_path, preexec_fn=few) as (process, url),
        ThreadPoolExecutor(CLIENTS) as pool,
    ):
        alone = stream(client, url)
        for _ in range(3):
            assert texts(crowd(pool, client, url)) == {alone}
        wait_for(lambda: idle(url))
        process.terminate()
        said = process.communicate(timeout=SECONDS)[1]
    assert process.returncode == 0 and "Traceback" not in said, said
