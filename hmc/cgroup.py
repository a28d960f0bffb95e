"""What the control groups of this process leave it of memory and CPU time, v2 or v1; hides where
their files are.

Every group on the way up to the root limits what is in it, so the tightest one counts.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hmc.files import integer, text_of

_UNLIMITED = 1 << 60
"""What v1 writes for no limit is above this."""


@dataclass(frozen=True)
class Memory:
    """Bytes that may be used, and how many of them can still be had."""

    limit: int
    left: int


def memory(root: Path = Path("/")) -> Memory | None:
    """What the groups allow; None when unlimited.

    Above memory.high processes are not killed but made to wait for reclaim, so it limits what runs
    well as memory.max limits what runs.
    """
    found: list[tuple[int, int]] = []
    for folder in groups("", root):
        limits = [integer(folder / f"memory.{name}") for name in ("max", "high")]
        given = [limit for limit in limits if limit is not None]
        if given:
            used = integer(folder / "memory.current") or 0
            found.append((min(given), used - _cached(folder)))
    for folder in groups("memory", root):
        limit = integer(folder / "memory.limit_in_bytes")
        if limit is not None and limit < _UNLIMITED:
            used = integer(folder / "memory.usage_in_bytes") or 0
            found.append((limit, used - _cached(folder)))
    if not found:
        return None
    left = min(limit - max(0, used) for limit, used in found)
    return Memory(min(limit for limit, _ in found), max(0, left))


def cpus(root: Path = Path("/")) -> float | None:
    """How many CPUs' time a second the process may use; None when unlimited."""
    found = []
    for folder in groups("", root):
        share, _, span = text_of(folder / "cpu.max").partition(" ")
        if share.isdigit() and span.isdigit():
            found.append(int(share) / int(span))
    for folder in groups("cpu", root):
        quota, period = (integer(folder / f"cpu.cfs_{name}_us") for name in ("quota", "period"))
        if quota is not None and period:  # no limit is -1, which is no count
            found.append(quota / period)
    return min(found, default=None)


def groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """The process's group and those around it, of a controller of v1 or ("") of v2."""
    top, own = root / "sys/fs/cgroup" / controller, ""
    for line in text_of(root / "proc/self/cgroup").splitlines():
        _, _, rest = line.partition(":")
        names, _, path = rest.partition(":")
        if controller in names.split(","):
            own = path.lstrip("/")
    for folder in (top / own, *(top / own).parents):
        yield folder
        if folder == top:
            return


def _cached(folder: Path) -> int:
    """Bytes of page cache that the kernel drops when memory is wanted.

    Both lists of file pages are reclaimed, the active one too: a checkpoint that was read twice is
    on it. Neither list holds shared memory (on the anonymous lists) or locked pages (on the
    unevictable one); what is dirty or being written back must reach a disk first
    (Documentation/admin-guide/cgroup-v2.rst and cgroup-v1/memory.rst: memory.stat).
    """
    lines = re.findall(r"^(\w+) (\d+)$", text_of(folder / "memory.stat"), re.M)
    found: dict[str, int] = {name: int(value) for name, value in lines}

    def count(*names: str) -> int:
        # v1 counts the groups below in names of their own, v2 in all.
        return sum(found.get(f"total_{name}", found.get(name, 0)) for name in names)

    dirty = ("file_dirty", "file_writeback", "dirty", "writeback")
    return max(0, count("inactive_file", "active_file") - count(*dirty))
