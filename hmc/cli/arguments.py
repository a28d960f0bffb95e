"""What commands share on their lines: lists and shapes as click's types, and what a figure needs to
be repeated.
"""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import click

from hmc.cli.output import size
from hmc.machine.detect import detect
from hmc.version import VERSION


class _Whole(click.IntRange):
    name = "whole number"


COUNT, POSITIVE = _Whole(min=0), _Whole(min=1)

THREADS = click.option(
    "--threads",
    type=POSITIVE,
    metavar="N",
    help="Native workers [default: the plan's, or one a core].",
)


class Several(click.ParamType):  # type: ignore[type-arg]
    """Values of a type with commas between them, as a list."""

    name = "list"

    def __init__(self, each: click.ParamType) -> None:  # type: ignore[type-arg]
        self._each = each

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> list[Any]:
        if not isinstance(value, str):
            return list(value)
        words = [word.strip() for word in value.split(",")]
        if not all(words):
            self.fail(f"{value!r}: give values with commas between them", param, ctx)
        return [self._each.convert(word, param, ctx) for word in words]


class Shape(click.ParamType):  # type: ignore[type-arg]
    """`2048x7168` as (rows, K)."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        try:
            rows, k = (int(part) for part in value.lower().split("x"))
        except ValueError:
            self.fail(f"{value!r} is not ROWSxK, such as 2048x7168", param, ctx)
        return rows, k


def circumstances(ctx: click.Context, isa: str, threads: int) -> dict[str, Any]:
    """What a figure needs to be repeated; the command line is the context's `obj`."""
    machine = detect()
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {size(machine.memory_bytes)}",
        "isa": isa,
        "threads": threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ctx.obj,
        "hmc_version": VERSION,
    }
