"""Interleaved measurement: rates of memory drift by half within minutes on shared machines, so
nothing is compared but neighbours in time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Rate = Callable[[], float]
"""Does the work once and returns its rate, in the unit of what it is compared with."""

Report = Callable[[str, int, int], None]
"""Told what is being done, how much of it is done, and how much there is."""


def silent(what: str, done: int, total: int) -> None:
    """A `Report` that tells nobody."""


@dataclass(frozen=True)
class Compared:
    """Rates in the order in which they were measured, and the reference right before and right
    after each.
    """

    values: tuple[float, ...]
    before: tuple[float, ...]
    after: tuple[float, ...]

    @property
    def references(self) -> tuple[float, ...]:
        """All of them."""
        return (*self.before, *self.after[-1:])

    @property
    def quotients(self) -> tuple[float, ...]:
        """Each value over the mean of the references around it."""
        around = zip(self.values, self.before, self.after, strict=True)
        return tuple(2 * value / (before + after) for value, before, after in around)

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
        """Median of the quotients."""
        return statistics.median(self.quotients)


def in_turn(
    values: Sequence[Rate], reference: Rate, repetitions: int, what: str, report: Report = silent
) -> list[Compared]:
    """`repetitions` of each value, each between two passes of the reference; values take turns, so
    that their ratios to each other come from the same minutes too. All are warmed up by the caller.
    """
    befores: list[list[float]] = [[] for _ in values]
    found: list[list[float]] = [[] for _ in values]
    afters: list[list[float]] = [[] for _ in values]
    last = reference()
    for number in range(repetitions):
        report(what, number, repetitions)
        for value, before, rates, after in zip(values, befores, found, afters, strict=True):
            before.append(last)
            rates.append(value())
            last = reference()
            after.append(last)
    report(what, repetitions, repetitions)
    return [
        Compared(tuple(rates), tuple(before), tuple(after))
        for before, rates, after in zip(befores, found, afters, strict=True)
    ]
