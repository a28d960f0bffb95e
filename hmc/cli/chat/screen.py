"""Where an answer, a thought and a note go: at a terminal thoughts are dim; elsewhere standard
output has the answers alone, and no escape codes.
"""

from __future__ import annotations

import os
import sys
from typing import TextIO

import click

_CONTROLS = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
"""What a terminal would take for commands; a model has none to give."""
_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"


class Screen:
    """Standard output and error."""

    def __init__(self) -> None:
        self.terminal = sys.stdout.isatty()
        styled = self.terminal and "NO_COLOR" not in os.environ
        self._styled = styled and os.environ.get("TERM") != "dumb"
        self._thinking = False

    def thought(self, text: str) -> None:
        """More of what the model thinks aloud."""
        if not text:
            return
        if not self._thinking:
            self._thinking = True
            self._style(_DIM)
        self._put(text, sys.stdout if self.terminal else sys.stderr)

    def text(self, text: str) -> None:
        """More of an answer."""
        if not text:
            return
        self._end_thought("\n\n")
        self._put(text, sys.stdout)

    def end(self) -> None:
        """The answer is over."""
        self._end_thought("\n")
        self._put("\n", sys.stdout)

    def say(self, text: str) -> None:
        """What a command has to show, on lines of its own."""
        click.echo(text if not self.terminal else text.translate(_CONTROLS))

    def note(self, text: str) -> None:
        """What is no part of the conversation."""
        click.echo(f"[{text}]", err=True)

    def error(self, text: str) -> None:
        """What was wrong with something asked."""
        click.echo(f"hmc: error: {text}", err=True)

    def _end_thought(self, after: str) -> None:
        if self._thinking:
            self._thinking = False
            self._style(_PLAIN)
            self._put(after, sys.stdout if self.terminal else sys.stderr)

    def _style(self, code: str) -> None:
        if self._styled:
            sys.stdout.write(code)

    def _put(self, text: str, stream: TextIO) -> None:
        stream.write(text.translate(_CONTROLS) if stream.isatty() else text)
        stream.flush()
