"""Chat templates rendered in a process of its own: templates come with a checkpoint and are not
trusted, and what users send decides how often their loops run.

Why a process: a template has a hundred ways to ask for too much in one step of the interpreter
(`"x" * 10**10`, `10**10**9`, a width in a format, comparing lists that hold themselves twice,
constants folded while it is compiled). Hooks on each would be a list that is never whole, and the
step would keep every other thread waiting. The operating system bounds the memory of a process, and
one that takes too long is killed; meanwhile the threads here go on.
"""

from __future__ import annotations

import pickle
import sys
import threading
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from hmc.errors import ExecutionError, UsageError, WorkerError
from hmc.runtime.children import Child

_COMMAND = (sys.executable, "-m", "hmc.runtime.tokens.child")
SECONDS = 10.0
"""How long one conversation may take, and wait for a process before."""
_START_SECONDS = 60.0
_MOST_PROCESSES = 4


@dataclass(frozen=True)
class Ask:
    """A template, the names it is given, and the mark that its JSON leaves alone."""

    source: str
    names: dict[str, Any]
    mark: str


@dataclass(frozen=True)
class Told:
    """The text, or what went wrong, in a sentence."""

    text: str | None
    error: str


class Renderers:
    """Up to four processes, started when they are needed and kept; for any thread."""

    def __init__(self) -> None:
        self._free: deque[Child] = deque()
        self._places = threading.Semaphore(_MOST_PROCESSES)

    def render(self, ask: Ask, seconds: float = SECONDS) -> str:
        """The text of a template.

        Raises `UsageError` with the template's line when it refuses, fails, or takes too much time
        or memory; `ExecutionError` when all processes are busy for so long.
        """
        if not self._places.acquire(timeout=seconds):
            raise ExecutionError("the chat template is busy with other conversations: try again")
        try:
            told = self._told(ask, seconds)
        finally:
            self._places.release()
        if told.text is None:
            raise UsageError(told.error)
        return told.text

    def _told(self, ask: Ask, seconds: float) -> Told:
        """What a process says; one that is not heard to the end is no more."""
        child, heard = self._child(), False
        try:
            child.send(ask)
            told = child.hear(seconds)
            heard = isinstance(told, Told)
        except (pickle.PicklingError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(f"the messages are no plain data: {error}") from error
        except WorkerError as error:
            raise UsageError(f"the chat template cannot take these messages: {error}") from error
        finally:
            if heard:
                self._free.append(child)
            else:
                child.kill()
                child.end()
        if not isinstance(told, Told):
            raise UsageError(f"the chat template takes more than {seconds:g} s for these messages")
        return told

    def _child(self) -> Child:
        """One that has nothing to do."""
        while self._free:
            with suppress(IndexError):  # another thread was faster
                child = self._free.pop()
                if not child.dead:
                    return child
                child.end()
        return _started()


def _started() -> Child:
    """A process that is ready to render."""
    name, remedy = "the process that renders the chat template", "shorten them, or try again"
    try:
        child = Child(_COMMAND, None, (), name=name, remedy=remedy)
    except OSError as error:
        raise ExecutionError(f"{name} does not start: {error}") from error
    try:
        if child.hear(_START_SECONDS) is None:
            raise ExecutionError(f"{name} does not start: try again")
    except WorkerError as error:
        child.end()
        raise ExecutionError(str(error)) from error
    return child
