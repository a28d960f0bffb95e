"""`hmc run --chat` at a terminal that the test plays: editing, history, pastes, Ctrl-C, the end."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import select
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SECONDS = 60
CTRL_A, CTRL_C, CTRL_D, CTRL_U, UP = "\x01", "\x03", "\x04", "\x15", "\x1b[A"


class Typist:
    """The other end of a program's terminal."""

    def __init__(self, descriptor: int, program: int) -> None:
        self._descriptor, self._program = descriptor, program
        self.seen = ""

    def type(self, text: str) -> None:
        os.write(self._descriptor, text.encode())

    def interrupt(self) -> None:
        """Ctrl-C at a prompt, once the program waits for keys: Python's readline sees a signal that
        comes between its prompt and that only with the next key.
        """
        stat = Path(f"/proc/{self._program}/task/{self._program}/stat")
        end, asleep = time.monotonic() + SECONDS, 0
        while asleep < 5:
            assert time.monotonic() < end, "the program does not wait for keys"
            time.sleep(0.01)
            asleep = asleep + 1 if stat.read_text().rpartition(")")[2].split()[0] == "S" else 0
        self.type(CTRL_C)

    def wait_for(self, text: str) -> str:
        """Read until `text` comes; what came up to there since the last time."""
        end = time.monotonic() + SECONDS
        while text not in self.seen:
            assert time.monotonic() < end, f"{text!r} does not come: {self.seen!r}"
            if select.select([self._descriptor], [], [], 1)[0]:
                try:
                    more = os.read(self._descriptor, 4096)
                except OSError:  # the program has closed its end
                    more = b""
                assert more, f"it ended without {text!r}: {self.seen!r}"
                self.seen += more.decode(errors="replace")
        found, _, self.seen = self.seen.partition(text)
        return found


@contextmanager
def at_a_terminal(
    arguments: list[str], state: Path
) -> Iterator[tuple[Typist, subprocess.Popen[bytes]]]:
    ours, theirs = pty.openpty()
    environment = {**os.environ, "TERM": "xterm", "HMC_STATE": str(state)}
    environment.pop("NO_COLOR", None)
    program = subprocess.Popen(
        [sys.executable, "-m", "hmc", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # where Ctrl-C comes from
    )
    os.close(theirs)
    try:
        yield Typist(ours, program.pid), program
    finally:
        program.kill()
        program.wait(SECONDS)
        os.close(ours)


def test_a_conversation_is_typed(talking: Path, tmp_path: Path) -> None:
    history = tmp_path / "chat-history"
    history.write_text('"Why do they go"\n')
    command = ["run", str(talking), "--chat", "-n", "12", "--temperature", "0"]
    with at_a_terminal(command, tmp_path) as (typist, program):
        typist.wait_for("> ")
        typist.type("is he" + CTRL_A + "Who \r")  # edited in the middle
        typist.wait_for("cut off: max_new_tokens is reached]")
        typist.wait_for("> ")
        typist.type(UP + UP + "\r")  # from before this run
        typist.wait_for("cut off")
        typist.wait_for("> ")
        typist.type("\x1b[200~one\ntwo\x1b[201~\r")  # a paste of two lines is one message
        typist.wait_for("cut off")
        typist.wait_for("> ")
        typist.type("/st\t\r")  # completed
        assert "3: prompt" in typist.wait_for("context: ")
        typist.wait_for("> ")
        typist.type(f"/save {tmp_path}/talk.json\r")
        typist.wait_for("6 messages")
        typist.wait_for("> ")
        typist.type("/set max_new_tokens\r")
        typist.wait_for("> ")
        typist.type("/set thinking on\r")
        typist.wait_for("> ")
        typist.type("Tell me\r")
        typist.wait_for("\x1b[2m")  # what it thinks is dim
        typist.type(CTRL_C)
        assert "Traceback" not in typist.wait_for("> ")
        typist.type("half a line")
        typist.wait_for("half a line")
        typist.interrupt()
        typist.wait_for("> ")
        typist.type("/stats\r")
        typist.wait_for("4: prompt")
        typist.wait_for("> ")
        typist.interrupt()
        typist.wait_for("once more")
        typist.wait_for("> ")
        typist.interrupt()
        assert program.wait(SECONDS) == 0
    saved = json.loads((tmp_path / "talk.json").read_text())["messages"]
    assert [each["content"] for each in saved if each["role"] == "user"] == [
        "Who is he",
        "Why do they go",
        "one\ntwo",
    ]
    assert json.loads(history.read_text().splitlines()[3]) == "one\ntwo"


@pytest.mark.slow
def test_ctrl_d_ends_it(talking: Path, tmp_path: Path) -> None:
    with at_a_terminal(["run", str(talking), "--chat"], tmp_path / "none") as (typist, program):
        typist.wait_for("> ")
        typist.type(CTRL_D)
        assert program.wait(SECONDS) == 0
