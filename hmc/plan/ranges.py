"""Expert numbers as text, "0-31,77": read, and checked."""

from __future__ import annotations

import re

from hmc.errors import VerifyError

_PART = re.compile(r"([0-9]{1,9})(?:-([0-9]{1,9}))?")


def intervals(text: str) -> list[tuple[int, int]]:
    """(first, last) of every part of a text such as "0-31,77"; `VerifyError` when it is none."""
    result = []
    for part in filter(None, text.split(",")):
        found = _PART.fullmatch(part)
        first = int(found[1]) if found else 0
        last = int(found[2] or found[1]) if found else -1
        if last < first:
            raise VerifyError(f"placement: '{text}' is no list of expert ranges")
        result.append((first, last))
    return result


def expert_ranges(text: str) -> list[int]:
    """The expert numbers of a text, in its order; `VerifyError` when it is none."""
    return [each for first, last in intervals(text) for each in range(first, last + 1)]
