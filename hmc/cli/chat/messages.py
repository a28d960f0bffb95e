'''A message of one line or several: what stands between `"""`, or lines that end in a backslash.'''

from __future__ import annotations

from collections.abc import Callable

from hmc.errors import UsageError

QUOTES = '"""'
FIRST, NEXT = "> ", ". "

Line = Callable[[str], str]
"""The next line, without its end, asked for with a prompt; `EOFError` where there is none."""


def message(line: Line) -> str:
    """The next message; `UsageError` where the input ends within one."""
    first = line(FIRST)
    try:
        if first.lstrip().startswith(QUOTES):
            return _quoted(first.lstrip().removeprefix(QUOTES), line)
        return _continued(first, line)
    except EOFError:
        raise UsageError("the input ends within a message: it is not sent") from None


def _quoted(text: str, line: Line) -> str:
    while not text.rstrip().endswith(QUOTES):
        text += "\n" + line(NEXT)
    return text.rstrip().removesuffix(QUOTES).strip("\n")


def _continued(text: str, line: Line) -> str:
    while text.endswith("\\"):
        text = text[:-1] + "\n" + line(NEXT)
    return text
