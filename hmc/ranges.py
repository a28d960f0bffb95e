"""Whole numbers as text, "0-3,7": experts of a placement, layers of a decision, CPUs in /sys.

One place prints and one reads them, so that what one part of hmc writes every other understands.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from hmc.errors import VerifyError

_PART = re.compile(r"(?a:(\d{1,9})(?:-(\d{1,9}))?)")
_MOST = 1 << 20
"""Numbers a text may stand for: more experts, layers or CPUs than anything has."""


def ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text, ascending and each run as one: 0-3,7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def intervals(text: str) -> list[tuple[int, int]]:
    """(first, last) of every part of such a text in its order, none of an empty one; `ValueError`
    says what is wrong with another.
    """
    found: list[tuple[int, int]] = []
    many = 0
    for part in filter(None, text.strip().split(",")):
        match = _PART.fullmatch(part)
        if match is None:
            raise ValueError(f"'{text}' is no list of ranges such as 0-31,77")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"the range {part} is empty")
        many += last - first + 1
        if many > _MOST:
            raise ValueError(f"the range {part} is too long")
        found.append((first, last))
    return found


def parse(text: str) -> list[int]:
    """The numbers of such a text in its order; `ValueError` as `intervals` says."""
    return [each for first, last in intervals(text) for each in range(first, last + 1)]


def expert_intervals(text: str) -> list[tuple[int, int]]:
    """Intervals of expert numbers of a placement text; `VerifyError` when it is none."""
    try:
        return intervals(text)
    except ValueError as error:
        raise VerifyError(f"placement: {error}") from error


def expert_ranges(text: str) -> list[int]:
    """Expert numbers of a placement text such as "0-31,77"; `VerifyError` when it is none."""
    return [each for first, last in expert_intervals(text) for each in range(first, last + 1)]
