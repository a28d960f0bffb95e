"""What commands share on their lines: lists and shapes as click's types, what runs plans and where
weights are; what a figure needs to be repeated, and what is said of devices.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from hmc.cli.output import size
from hmc.env import MOST_THREADS
from hmc.machine.detect import detect
from hmc.version import VERSION

if TYPE_CHECKING:
    from hmc.runtime.executor import Executor


Option = Callable[[Any], Any]
"""A decorator of commands."""


class _Whole(click.IntRange):
    name = "whole number"


COUNT, POSITIVE = _Whole(min=0), _Whole(min=1)


def option(*names: str, **settings: Any) -> Option:
    """`click.option`; a default is shown where it is more than nothing."""
    return click.option(*names, show_default=bool(settings.get("default")), **settings)


def count(*names: str, metavar: str = "N", **settings: Any) -> Option:
    """An option of a whole number, 0 where nothing else is said."""
    return option(*names, metavar=metavar, **{"type": COUNT, "default": 0} | settings)


def positive(*names: str, metavar: str = "N", **settings: Any) -> Option:
    """An option of a whole number from 1 on; None where it is not given and has no default."""
    return option(*names, metavar=metavar, type=POSITIVE, **settings)


def output(what: str, default: str = "") -> Option:
    """Where a command writes; it has to be said unless there is a `default`, told in words."""
    file = click.Path(dir_okay=False)
    about = f"The {what} to write{f' [default: {default}]' if default else ''}."
    return click.option("-o", "--output", required=not default, type=file, help=about)


THREADS = option(
    "--threads",
    metavar="N",
    type=_Whole(1, MOST_THREADS),
    help="Native workers [default: the plan's, or one a core].",
)
REPETITIONS = positive("--repetitions", default=5, metavar="R", help="Turns of each measurement.")
CHECKPOINT = option("--checkpoint", metavar="DIR", help="Model directory, if it has moved.")
DUMMY_WEIGHTS = option(
    "--dummy-weights", is_flag=True, help="Random weights: times are real, tokens are not."
)
RATES = option(
    "--machine",
    metavar="FILE",
    help="Predict with these rates [default: the plan's, else the profile that `hmc probe` saved].",
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


_SECONDS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


class Duration(click.ParamType):  # type: ignore[type-arg]
    """`90s`, `10m`, `1.5h` or plain seconds, as seconds; 0 only where that means something."""

    name = "duration"

    def __init__(self, *, zero: bool = True) -> None:
        self._zero = zero

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        if isinstance(value, float):
            return value
        found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", value.strip())
        if found is None:
            self.fail(f"{value!r} is no time, such as 90s, 10m or 2h", param, ctx)
        seconds = float(found[1]) * _SECONDS[found[2]]
        if not seconds and not self._zero:
            self.fail("it has to be more than 0", param, ctx)
        return seconds


def circumstances(isa: str, threads: int) -> dict[str, Any]:
    """What a figure of this machine needs to be repeated."""
    machine = detect()
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {size(machine.memory_bytes)}",
        "isa": isa,
        "threads": threads,
        **invocation(),
    }


def invocation() -> dict[str, Any]:
    """When which command ran; its line is the context's `obj`."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": click.get_current_context().obj,
        "hmc_version": VERSION,
    }


DEVICES = option(
    "--devices",
    type=click.Choice(["auto", "cuda", "host"]),
    default="auto",
    help="What runs a plan's GPU steps: this machine's GPUs (auto, cuda), or threads and memory of"
    " the CPU in their place (host), for tests and debugging.",
)

_GPUS = option(
    "--gpus",
    type=int,
    metavar="N",
    help="Drive each of the N GPUs that share long prompts by a process of its own; N is the plan's"
    " [default: one process drives all].",
)
_HOME = option(
    "--home",
    type=click.Choice(["mapped", "arena", "shared"]),
    default="mapped",
    help="Weights in the page cache, copied to huge pages, or to a memory file that the processes"
    " of --gpus share.",
)


def placed(command: Any) -> Any:
    """The options of the commands that run plans: what runs them, where their weights are."""
    return DEVICES(_GPUS(_HOME(command)))


@contextmanager
def telling(executor: Executor) -> Iterator[None]:
    """Say on stderr where weights lie on several NUMA nodes, what is pinned for GPUs and how decode
    is handed over to them; and once more after the block where that has changed in it, since a GPU
    refused what was tried.
    """
    before = executor.handover
    for told in filter(None, (executor.placed, executor.pinned, before)):
        click.echo(f"[{told}]", err=True)
    yield
    if executor.handover != before:
        click.echo(f"[{executor.handover}]", err=True)
