"""Interleaved measurement: rates of memory drift by half within minutes on shared machines, so
nothing is compared but neighbours in time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import dataclass

Rate = Callable[[], float]
"""Does the work once and returns its rate, in the unit of what it is compared with."""

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that tells nobody."""


@dataclass(frozen=True)
class Compared:
    """Rates in the order in which they were measured: reference i, value i, reference i + 1."""

    values: tuple[float, ...]
    references: tuple[float, ...]

    @property
    def value(self) -> float:
        """Median of the values."""
        return statistics.median(self.values)

    @property
    def reference(self) -> float:
        """Median of the references."""
        return statistics.median(self.references)

    @property
    def ratio(self) -> float:
        """Median of each value over the mean of the references right before and after it."""
        around = zip(self.values, self.references, self.references[1:], strict=False)
        return statistics.median(2 * value / (before + after) for value, before, after in around)


def interleave(
    value: Rate, reference: Rate, repetitions: int, what: str, report: Report = silent
) -> Compared:
    """`repetitions` values, each between two passes of the reference; both are warmed up by the
    caller."""
    references = [reference()]
    values = []
    for number in range(repetitions):
        report(what, number, repetitions)
        values.append(value())
        references.append(reference())
    report(what, repetitions, repetitions)
    return Compared(tuple(values), tuple(references))
