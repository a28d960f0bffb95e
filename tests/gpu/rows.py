"""Rows of the GPU check and the sections that make them: each section has a time budget and a try
of its own, so that one that fails or takes too long costs the others nothing.
"""

from __future__ import annotations

import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from hmc.errors import HmcError

_COLUMNS = ("section", "case", "what", "value", "against", "reference", "ratio", "verdict")
_NUMBERS = ("value", "reference", "ratio")

Verdict = Literal["", "ok", "missed", "FAILED", "left out"]
"""Of a row: nothing to judge; within its bound; a goal of speed not reached; wrong or an error; not
measured for lack of time."""


@dataclass(frozen=True)
class Row:
    """One figure beside what it is compared with, in SI units (`unit`); `note` says how it came
    about, or what went wrong."""

    section: str
    case: str
    what: str
    value: float | None = None
    unit: str = ""
    against: str = ""
    reference: float | None = None
    verdict: Verdict = ""
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """value / reference."""
        if self.value is None or not self.reference:
            return None
        return self.value / self.reference

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "section": self.section,
            "case": self.case,
            "what": self.what,
            "value": self.value,
            "unit": self.unit,
            "against": self.against,
            "reference": self.reference,
            "ratio": self.ratio,
            "verdict": self.verdict,
            "note": self.note,
        }

    def cells(self) -> tuple[str, ...]:
        """As text, in the order of the table's columns."""
        value, reference = (_number(each, self.unit) for each in (self.value, self.reference))
        ratio = "" if self.ratio is None else f"{self.ratio:.3g}"
        told = " ".join(each for each in (self.verdict, self.note) if each)
        return self.section, self.case, self.what, value, self.against, reference, ratio, told


class BudgetSpentError(HmcError):
    """A section's time is over before a measurement could begin."""


class Clock:
    """The time a section has."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self._until = time.monotonic() + seconds

    def check(self, what: str) -> None:
        """Raise `BudgetSpentError` where nothing more may be begun; `what` would have been next."""
        if time.monotonic() >= self._until:
            raise BudgetSpentError(
                f"{what} and what follows: the section's {self.seconds:.0f} s are spent"
            )


@dataclass(frozen=True)
class Section:
    """`run` yields rows, and asks the clock before whatever takes long."""

    name: str
    seconds: float
    run: Callable[[Clock], Iterator[Row]]


def run_sections(
    sections: Sequence[Section], seconds: float, report: Callable[[str], None]
) -> list[Row]:
    """All rows of all sections, in no more than `seconds` and what was begun by then. An error ends
    its section with a row that tells it."""
    until = time.monotonic() + seconds
    rows: list[Row] = []
    for section in sections:
        began = time.monotonic()
        count = len(rows)
        try:
            for row in section.run(Clock(min(section.seconds, until - began))):
                rows.append(row)
        except BudgetSpentError as spent:
            rows.append(Row(section.name, "", "", verdict="left out", note=str(spent)))
        except Exception as error:
            if not isinstance(error, HmcError):  # a defect: where it is matters
                traceback.print_exception(error, file=sys.stderr)
            rows.append(Row(section.name, "", "", verdict="FAILED", note=_told(error)))
        took = time.monotonic() - began
        report(f"{section.name}: {len(rows) - count} rows in {took:.1f} s")
    return rows


def sound(rows: Sequence[Row]) -> bool:
    """Whether all that was to be checked was, and nothing is wrong; goals of speed do not count."""
    return bool(rows) and not any(row.verdict in ("FAILED", "left out") for row in rows)


def text_table(rows: Sequence[Row]) -> str:
    """The rows as aligned lines under their headings; nothing is cut or folded."""
    lines = [_COLUMNS, *(row.cells() for row in rows)]
    widths = [max(len(cell) for cell in column) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(
            cell.rjust(width) if name in _NUMBERS else cell.ljust(width)
            for name, cell, width in zip(_COLUMNS, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


def _told(error: Exception) -> str:
    first = (str(error).splitlines() or [""])[0]
    return first if isinstance(error, HmcError) else f"{type(error).__name__}: {first}"


def _number(value: float | None, unit: str) -> str:
    if value is None:
        return ""
    if unit in ("B/s", "FLOP/s"):
        prefix, scale = ("T", 1e12) if value >= 1e12 else ("G", 1e9)
        return f"{value / scale:.4g} {prefix}{unit}"
    if unit == "s" and value < 1e-3:
        return f"{value * 1e6:.3g} µs"
    return f"{value:.4g} {unit}".strip()
