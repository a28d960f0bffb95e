"""Plans run on devices that the CPU plays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hmc.plan import Plan
from hmc.runtime.executor import Executor


@contextmanager
def executor(plan: Plan, directory: Path, **options: Any) -> Iterator[Executor]:
    """An executor with two threads; `options` are its own."""
    found = Executor(plan, directory, **{"threads": 2, "devices": "host", **options})
    try:
        yield found
    finally:
        found.close()
