"""Turn by turn until the end of input: at a terminal errors are told and the conversation goes on;
through pipes the first one ends it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from hmc.cli.chat import commands
from hmc.cli.chat.commands import Quit
from hmc.cli.chat.history import History
from hmc.cli.chat.messages import message
from hmc.cli.chat.screen import Screen
from hmc.cli.chat.session import Session
from hmc.cli.chat.terminal import InterruptedLine, Terminal
from hmc.errors import UsageError
from hmc.runtime.engine import Engine
from hmc.runtime.routing import RoutingRecorder
from hmc.runtime.tokens.text import Text


def talk(
    engine: Engine,
    text: Text,
    options: Mapping[str, Any],
    system: str = "",
    routing: RoutingRecorder | None = None,
) -> None:
    """A conversation on standard input and output; `options` as `Session` has them."""
    screen = Screen()
    with Session(engine, text, screen, options, system, routing) as session:
        if sys.stdin.isatty() and screen.terminal:
            screen.note("/help lists commands; Ctrl-D ends the conversation")
            _typed(session, Terminal(History(), commands.complete, screen.note))
        else:
            _piped(session)


def _typed(session: Session, terminal: Terminal) -> None:
    interrupted = False
    while True:
        try:
            text = message(terminal.line)
        except InterruptedLine as pressed:
            if pressed.empty and interrupted:
                return
            interrupted = True
            if pressed.empty:
                session.screen.note("Ctrl-C once more, or Ctrl-D, ends the conversation")
            continue
        except UsageError as error:
            session.screen.error(str(error))
            continue
        except EOFError:
            print()
            return
        interrupted = False
        if not text.strip():
            continue
        terminal.remember(text)
        try:
            interrupted = _said(session, text)
        except Quit:
            return
        except UsageError as error:
            session.screen.error(str(error))


def _piped(session: Session) -> None:
    while True:
        try:
            text = message(_line)
        except EOFError:
            return
        if not text.strip():
            continue
        try:
            if _said(session, text):
                raise KeyboardInterrupt
        except Quit:
            return


def _said(session: Session, text: str) -> bool:
    """Do or answer it; whether Ctrl-C ended an answer."""
    answers = len(session.turns)
    if text.startswith("/"):
        commands.run(session, text)
    else:
        session.ask(text)
    return any(turn.reason == "cancelled" for turn in session.turns[answers:])


def _line(prompt: str) -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")
