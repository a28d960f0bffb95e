"""`dealt`: many combinations, of which `make test` runs a few and `make test-all` all."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

import pytest


def dealt(*axes: Iterable[Any]) -> list[Any]:
    """Every combination of the axes' values, for `pytest.mark.parametrize`; values that are tuples
    are laid flat.

    Those of the last axis are dealt out in turn over the combinations of the others: each of these
    runs with one of them always, and with the rest in `make test-all`.
    """
    lists = [list(axis) for axis in axes]
    found = []
    for places in product(*map(range, map(len, lists))):
        values: list[Any] = []
        for axis, at in zip(lists, places, strict=True):
            values += axis[at] if isinstance(axis[at], tuple) else (axis[at],)
        always = sum(places[:-1]) % len(lists[-1]) == places[-1]
        found.append(pytest.param(*values, marks=() if always else pytest.mark.slow))
    return found
