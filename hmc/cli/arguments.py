"""What the commands of `hmc bench` share: lists on the command line, and what a figure needs to be
repeated.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import click

from hmc.cli.output import size
from hmc.errors import UsageError
from hmc.machine.detect import detect
from hmc.version import VERSION

COMMAND_LINE = "hmc.bench.command"
"""Key of `click.Context.meta`: the command line as it was typed."""

THREADS = click.option(
    "--threads", type=int, metavar="N", help="Native workers [default: the plan's, or one a core]."
)


def circumstances(ctx: click.Context, isa: str, threads: int) -> dict[str, Any]:
    """What a figure needs to be repeated."""
    machine = detect()
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {size(machine.memory_bytes)}",
        "isa": isa,
        "threads": threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ctx.meta[COMMAND_LINE],
        "hmc_version": VERSION,
    }


def split(option: str, text: str) -> list[str]:
    """The words between commas; `UsageError` where one is empty."""
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} {text!r}: give values with commas between them")
    return words


def _list(option: str, text: str, read: Callable[[str], Any], form: str) -> list[Any]:
    try:
        return [read(word) for word in split(option, text)]
    except ValueError:
        raise UsageError(f"{option} {text}: {form}") from None


def numbers(option: str, text: str, *, least: int) -> list[int]:
    """Whole numbers between commas, none below `least`."""
    found = _list(option, text, int, "not a list of whole numbers")
    for number in found:
        at_least(option, number, least)
    return found


def shapes_of(text: str) -> list[tuple[int, int]]:
    """`2048x7168,...` as (rows, K)."""

    def read(word: str) -> tuple[int, int]:
        rows, k = (int(part) for part in word.lower().split("x"))
        return rows, k

    return _list("--shape", text, read, "not a list of ROWSxK, such as 2048x7168")


def at_least(option: str, value: int, least: int) -> None:
    """Raise `UsageError` for a value below `least`."""
    if value < least:
        raise UsageError(f"{option} {value}: must be at least {least}")
