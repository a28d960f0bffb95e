"""docs/recipes.md: its commands against live servers of the example model, with the real packages.
`make test-recipes` runs them: the packages are an extra of their own.
"""

from __future__ import annotations

import os
import queue
import re
import shlex
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import pytest

ROOT = Path(__file__).parents[2]
DOCS = (ROOT / "docs" / "recipes.md").read_text()
PORT = "127.0.0.1:8000"
SECONDS = 300
TEXT = "And the LORD spake unto Moses"

pytestmark = pytest.mark.slow


def needs(*packages: str) -> pytest.MarkDecorator:
    """Skips a test where a package is missing, with its name."""
    missing = [each for each in packages if find_spec(each) is None]
    return pytest.mark.skipif(
        bool(missing), reason=f"needs {', '.join(missing)}: make test-recipes"
    )


def commands(section: str) -> list[list[str]]:
    """The commands of a section of the docs, word by word."""
    (text,) = re.findall(rf"^## {re.escape(section)}\n(.*?)(?=^## |\Z)", DOCS, re.M | re.S)
    lines = text.replace("\\\n", " ").splitlines()
    return [shlex.split(line.split("$ ", 1)[1]) for line in lines if line.startswith("    $ ")]


@contextmanager
def started(words: list[str], ready: Callable[[str], Any]) -> Iterator[Any]:
    """A program that runs for the length of a `with`; gives what `ready` found in a line of it."""
    program = subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    assert program.stdout is not None
    output, lines, said = program.stdout, queue.Queue[str](), []

    def read() -> None:
        for line in output:
            lines.put(line)
        lines.put("")  # it has ended

    reader = threading.Thread(target=read)
    reader.start()
    try:
        while (line := lines.get(timeout=SECONDS)) and not (found := ready(line)):
            said.append(line)
        assert line, "".join(said)
        yield program, found
    finally:
        program.send_signal(signal.SIGTERM)
        try:
            program.wait(60)
        except subprocess.TimeoutExpired:
            program.kill()
        reader.join(60)
        output.close()


def wait_for(url: str) -> None:
    """Until a server is healthy."""
    for _ in range(SECONDS * 10):
        try:
            if httpx.get(url, timeout=10).status_code == 200:
                return
        except httpx.TransportError:
            pass
        threading.Event().wait(0.1)
    raise AssertionError(f"{url} does not become healthy")


@contextmanager
def serving(plan: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`hmc serve` of a plan: the process and its address."""
    words = [sys.executable, "-m", "hmc", "serve", str(plan), "--port", "0"]
    with started(words, lambda line: re.search(r"serving tiny on (\S+)", line)) as (process, found):
        wait_for(f"{found[1]}/health")
        yield process, found[1]


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("recipes") / "tiny.hmp"
    words = [sys.executable, "-m", "hmc", "compile", "examples/tiny-kjv", "-o", str(path)]
    subprocess.run(words, cwd=ROOT, check=True, timeout=SECONDS)
    return path


@pytest.fixture(scope="module")
def url(plan: Path) -> Iterator[str]:
    with serving(plan) as (_, address):
        yield address


def answered(words: list[str], url: str) -> str:
    """What a command of the docs prints, with the server's address in place of the docs'."""
    if words[0] == "python":
        words = [sys.executable, *words[1:]]
    else:
        words = [str(Path(sys.executable).parent / words[0]), *words[1:]]
    words = [word.replace(f"http://{PORT}", url) for word in words]
    environment = {**os.environ, "HMC_URL": url, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.parametrize(
    ("section", "said"),
    [
        pytest.param("OpenAI", ("chat", "stream", "schema", "response"), marks=needs("openai")),
        pytest.param("Anthropic", ("message", "usage", "stream"), marks=needs("anthropic")),
        pytest.param("LiteLLM", ("openai", "anthropic", "stream"), marks=needs("litellm")),
        pytest.param(
            "LangChain",
            ("openai", "anthropic", "stream", "structured"),
            marks=needs("langchain_openai", "langchain_anthropic"),
        ),
    ],
)
def test_a_client_is_answered(url: str, section: str, said: tuple[str, ...]) -> None:
    (words,) = commands(section)
    lines = dict(line.split(":", 1) for line in answered(words, url).splitlines())
    assert tuple(lines) == said
    for name, line in lines.items():
        if name in ("schema", "structured"):
            assert "Zion" in line or "Tyre" in line
        elif name == "usage":
            assert re.fullmatch(r" \d+ in, 16 out", line)
        else:
            assert line.replace("|", "").strip().startswith(TEXT)


@needs("guidellm")
def test_guidellm_measures(url: str) -> None:
    (words,) = commands("guidellm")
    text = answered(words, url)
    assert "Benchmarking complete" in text
    assert re.search(r"concurrent@4 .*\| 16 +\| 0 +\| 0 ", text), text  # complete, cut, in error


@needs("sglang_router")
def test_the_router_goes_on_when_a_server_ends(plan: Path, url: str) -> None:
    words = next(
        each for each in commands("SGLang's router") if "sglang_router.launch_router" in each
    )
    at = words.index("--worker-urls")
    with serving(plan) as (second, address):
        port = _free_port()
        words = [sys.executable, *words[1 : at + 1], url, address, "--port", str(port)]
        words += ["--prometheus-port", str(_free_port())]
        router = f"http://127.0.0.1:{port}"
        with started(words, lambda line: True):
            wait_for(f"{router}/health")
            names = _names(router)
            assert names == ["tiny"]
            (chat,) = commands("OpenAI")
            assert TEXT in answered(chat, router)
            second.send_signal(signal.SIGTERM)
            assert second.wait(60) == 0
            for number in range(4):
                asked = {"model": "tiny", "prompt": f"In the year {number}", "max_tokens": 4}
                reply = httpx.post(f"{router}/v1/completions", json=asked, timeout=SECONDS)
                assert reply.status_code == 200, reply.text
                assert reply.json()["usage"]["completion_tokens"] > 0


def _names(router: str) -> list[str]:
    """The models that a router offers, once it has asked its servers."""
    for _ in range(600):
        reply = httpx.get(f"{router}/v1/models", timeout=10)
        if reply.status_code == 200 and reply.json()["data"]:
            return [each["id"] for each in reply.json()["data"]]
        threading.Event().wait(0.1)
    raise AssertionError("the router offers no model")


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])
