"""Processes of this one, and what becomes of those that stop, die or say nothing."""

from __future__ import annotations

import gc
import os
import signal
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

import pytest

from hmc.errors import WorkerError
from hmc.runtime import children
from hmc.runtime.children import Child, Stalled

SCRIPT = """
import sys, threading
from hmc.runtime.children import adopted

setup, parent = adopted(sys.argv[1:])

def take(message):
    if message == "much":
        parent.send(bytes(setup))
    parent.send(message)

parent.listen(take)
parent.send("ready")
threading.Event().wait()
"""
LARGE = 8 << 20


@pytest.fixture
def child(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Child]:
    monkeypatch.setattr(children, "_STALL_SECONDS", 1)
    script = tmp_path / "echo.py"
    script.write_text(SCRIPT)
    found = Child([sys.executable, str(script)], LARGE, [], name="the echo", remedy="shout again")
    assert found.hear(60) == "ready"
    yield found
    found.end()


def gone(pid: int) -> None:
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_messages_go_both_ways_and_nothing_is_left(child: Child) -> None:
    child.send({"a": 1})
    assert child.hear(20) == {"a": 1}
    assert child.hear(0.01) is None
    child.send("much")
    assert len(child.hear(20)) == LARGE and child.hear(20) == "much"
    assert not child.dead
    child.end()
    child.end()
    gone(child.pid)


@pytest.mark.slow
def test_a_stopped_process_takes_no_message_for_ever(child: Child) -> None:
    os.kill(child.pid, signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(Stalled, match=rf"the echo \(process {child.pid}\) did not go on.*: shout"):
        child.send(bytes(LARGE))
    child.end()
    assert time.monotonic() - began < 20
    gone(child.pid)


def test_a_process_stopped_in_the_middle_of_a_message_is_not_waited_for(child: Child) -> None:
    child.send("much")
    assert wait([child.fileno()], 20)
    os.kill(child.pid, signal.SIGSTOP)
    with pytest.raises(Stalled):
        child.hear(20)


def test_how_it_ended_is_told(child: Child) -> None:
    os.kill(child.pid, signal.SIGKILL)
    told = r"the echo \(process \d+\) was killed by signal 9 \(SIGKILL\): shout again"
    with pytest.raises(WorkerError, match=told):
        child.hear(20)
    assert child.dead
    with pytest.raises(WorkerError, match=told):
        child.send("anybody")


def test_a_process_ends_with_the_object(tmp_path: Path) -> None:
    script = tmp_path / "echo.py"
    script.write_text(SCRIPT)
    child = Child([sys.executable, str(script)], 0, [], name="the echo", remedy="")
    pid = child.pid
    del child
    gc.collect()
    gone(pid)
