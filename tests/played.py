"""Plans run on devices that the CPU plays."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hmc.plan import Plan
from hmc.runtime.devices.host import HostBackend
from hmc.runtime.executor import Executor


def delayed(plan: Plan, delays: int | None) -> HostBackend:
    """All GPUs of a plan, whose streams run ahead of each other by a seed."""
    gpus = plan.machine.gpus
    return HostBackend(len(gpus), [gpu.memory_bytes for gpu in gpus], delays=delays)


@contextmanager
def executor(
    plan: Plan, directory: Path, *, delays: int | None = None, **options: Any
) -> Iterator[Executor]:
    """An executor with two threads; `options` are its own."""
    if delays is not None:
        options["devices"] = delayed(plan, delays)
    found = Executor(plan, directory, **{"threads": 2, "devices": "host", **options})
    try:
        yield found
    finally:
        found.close()
