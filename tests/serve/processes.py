"""`hmc serve` in a process of its own, and what that process holds."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import psutil

SECONDS = 60.0


@contextmanager
def serving(
    plan_path: Path, *arguments: str, program: tuple[str, ...] = ("-m", "hmc"), **options: Any
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process and its address, once it is ready; killed at the end, if it has not ended."""
    serve = ["serve", str(plan_path), "--port", "0", *arguments]
    command = [sys.executable, *program, *serve]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options) as process:
        assert process.stderr is not None
        try:
            line = process.stderr.readline()
            found = re.search(r"serving \S+ on (http://\S+)", line)
            assert found, line + process.stderr.read()
            while httpx.get(f"{found[1]}/health").status_code != 200:
                time.sleep(0.05)
            yield process, found[1]
        finally:
            process.kill()


@dataclass(frozen=True)
class Held:
    """What a server holds: bytes resident in it, and in the largest of its children, threads, file
    descriptors but for one to each child, and its children.
    """

    resident: int
    child: int
    threads: int
    descriptors: int
    children: int


def held(pid: int) -> Held:
    """Of a process and its children, now."""
    process = psutil.Process(pid)
    children = process.children(recursive=True)
    resident = process.memory_info().rss
    child = max((each.memory_info().rss for each in children), default=0)
    descriptors = process.num_fds() - len(children)
    return Held(resident, child, process.num_threads(), descriptors, len(children))


def metric(url: str, name: str) -> float:
    """One figure of /metrics; of one with labels, their sum."""
    lines = httpx.get(f"{url}/metrics", timeout=SECONDS).text.splitlines()
    found = [float(line.split()[-1]) for line in lines if re.match(rf"{name}[ {{]", line)]
    assert found, name
    return sum(found)


def wait_for(done: Callable[[], bool]) -> None:
    """Until `done`; fails after a minute."""
    until = time.monotonic() + SECONDS
    while not done():
        assert time.monotonic() < until, "it does not come to be"
        time.sleep(0.02)


def idle(url: str) -> bool:
    """Whether a server has nothing to do, and no request holds a block of the cache."""
    figures = ("running", "prefilling", "waiting", "kv_blocks_used")
    return not any(metric(url, f"hmc_{name}") for name in figures)
