"""What tests of the hub share: commands and their errors."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-kjv"
COMMIT = "a" * 40
"""That of the played hub's main branch."""

Run = Callable[..., tuple[int, str, str]]
"""`run(*arguments)`: (exit code, standard output, standard error)."""


def refused(answer: tuple[int, str, str], code: int, *parts: str) -> None:
    """Assert that a command ended with this code and one line that has these parts."""
    found, _, err = answer
    assert found == code, err
    line = err.splitlines()[-1]
    assert line.startswith("hmc: error: ") and err.count("hmc: error: ") == 1, err
    for part in parts:
        assert part in line, err
