"""What the subcommands print with: tables, byte counts, progress bars, JSON; hides rich."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import click
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.markup import escape
from rich.table import Table

JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")

Report = Callable[[str, int, int], None]
"""`report(what, done, total)`, in any unit."""


def console() -> Console:
    """Standard output; plain text of at least 110 columns when it is no terminal."""
    found = Console(highlight=False, soft_wrap=False)
    return found if found.is_terminal else Console(highlight=False, width=max(110, found.width))


def print_json(value: Any) -> None:
    """One JSON document on standard output."""
    click.echo(json.dumps(value, indent=2, sort_keys=False))


def records(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> list[dict[str, object]]:
    """Rows of a table as JSON has them."""
    return [dict(zip(columns, row, strict=True)) for row in rows]


def table(
    title: str,
    columns: Sequence[str],
    rows: Iterable[Sequence[object]],
    numbers: Sequence[str] = (),
) -> Table:
    """A table; columns named in `numbers` are aligned right."""
    headed = any(columns)
    result = Table(
        title=title or None,
        show_header=headed,
        box=SIMPLE_HEAD if headed else None,
        title_justify="left",
        title_style="bold",
        pad_edge=False,
    )
    for column in columns:
        right = column in numbers
        result.add_column(
            column, justify="right" if right else "left", no_wrap=right, overflow="fold"
        )
    for row in rows:
        result.add_row(*(escape(str(cell)) for cell in row))
    return result


def size(count: float) -> str:
    """Bytes in the unit that reads best: 1.5 GB (powers of ten, as vendors count)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


@contextmanager
def progress(enabled: bool = True, *, transfer: bool = False) -> Iterator[Report]:
    """A progress bar on stderr for whatever is reported to it; shown from the first report on, on
    terminals only. Of a `transfer` bytes are reported, and the bar has speed and time left.
    """
    err = Console(stderr=True)
    if not enabled or not err.is_terminal:
        yield lambda what, done, total: None
        return
    from rich import progress as bars

    columns: list[bars.ProgressColumn] = [
        bars.TextColumn("{task.description}"),
        bars.BarColumn(),
    ]
    if transfer:
        columns += [
            bars.DownloadColumn(),
            bars.TransferSpeedColumn(),
            bars.TimeRemainingColumn(),
        ]
    else:
        columns.append(bars.TimeElapsedColumn())
    with bars.Progress(*columns, console=err, transient=True) as bar:
        tasks: dict[str, Any] = {}

        def report(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bar.add_task(what, total=total)
            bar.update(tasks[what], completed=done)

        yield report
