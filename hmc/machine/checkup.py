"""What makes hmc slower on a machine than it has to be: each finding with what it costs and the
command that mends it.

A machine is a tree of files as /proc and /sys have them, so any can be looked at. What does no harm
is no finding: locked memory without a GPU, NUMA balancing on one node.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from hmc import cgroup
from hmc.codegen.isa import TIERS, cpu_flags
from hmc.errors import UsageError
from hmc.files import integer, text_of

_THP = "sys/kernel/mm/transparent_hugepage"
_RESERVE = "sudo sysctl vm.nr_hugepages=N"
_READ_SECONDS = 2.0
_READ_BYTES = 1 << 30
_PIECE = 8 << 20
_SLOW_DISK = 5e8
"""Bytes a second of a SATA SSD: below, the start of a large model takes tens of minutes."""


@dataclass(frozen=True)
class Finding:
    """`mend` is a command, or what to do where no command can; "-" where nothing can."""

    item: str
    found: str
    cost: str
    mend: str


@dataclass(frozen=True)
class Needs:
    """Host bytes of a plan: its weights, which the page cache holds, and all else."""

    weights: int
    rest: int


def checkup(
    cpus: Sequence[int],
    root: Path = Path("/"),
    isa: str = "",
    needs: Needs | None = None,
) -> list[Finding]:
    """Findings about a machine of which the process may use some `cpus`. `isa` is the kernel tier
    that is used (default: not looked at), `needs` what is asked of its memory.
    """
    return [
        *_quota(root, len(cpus)),
        *_tier(root, isa),
        *_governor(root, cpus),
        *_huge_pages(root),
        *_numa(root),
        *_memory(root, needs),
        *_swap(root),
        *_locked(root),
    ]


def read_speed(path: Path) -> float:
    """Bytes a second that a file is read with from its disk, over up to 1 GiB and 2 s of reading;
    what the page cache has of that part is dropped before. `UsageError` for no readable file, or an
    empty one.
    """
    try:
        handle = os.open(path, os.O_RDONLY)
    except OSError as error:
        raise UsageError(f"{path}: {error.strerror}") from error
    try:
        most = min(os.fstat(handle).st_size, _READ_BYTES)
        os.posix_fadvise(handle, 0, most, os.POSIX_FADV_DONTNEED)
        began, done = time.perf_counter(), 0
        while done < most and time.perf_counter() - began < _READ_SECONDS:
            piece = len(os.pread(handle, _PIECE, done))
            if not piece:
                break
            done += piece
        seconds = time.perf_counter() - began
    except OSError as error:
        raise UsageError(f"{path}: cannot be read: {error.strerror}") from error
    finally:
        os.close(handle)
    if not done:
        raise UsageError(f"{path}: there is nothing to read")
    return done / seconds


def slow_disk(path: Path, speed: float, weights: int = 0) -> list[Finding]:
    """The finding about a disk that gives so many bytes a second, where that is slow."""
    if speed >= _SLOW_DISK:
        return []
    start = f": the first {_gb(weights)} take {weights / speed / 60:.0f} minutes" if weights else ""
    cost = f"weights are read once before they are in the page cache{start}"
    return [Finding("disk", f"{speed / 1e6:.0f} MB/s from {path}", cost, "a copy on an NVMe disk")]


def _quota(root: Path, cpus: int) -> Iterator[Finding]:
    quota = cgroup.cpus(root)
    if quota is not None and quota < cpus:
        threads = max(1, int(quota))
        yield Finding(
            "CPU quota",
            f"{quota:g} CPUs' time for {cpus} usable CPUs",
            f"hmc starts {threads} worker(s): with more, all are stopped in every period, and each"
            " step waits for the last one",
            "raise cpu.max of the group, or docker run --cpus",
        )


def _tier(root: Path, isa: str) -> Iterator[Finding]:
    best, *_ = names = list(TIERS)
    place = names.index(isa) if isa else 0
    if not place:
        return
    flags = cpu_flags(root / "proc/cpuinfo")
    usable = [at for at, name in enumerate(names) if TIERS[name].flags <= flags]
    missing = " ".join(sorted(TIERS[best].flags - flags))
    if min(usable, default=place) < place:
        found, mend = f"{isa}, though {names[usable[0]]} is there", "unset HMC_ISA"
    elif "hypervisor" in flags:
        found, mend = (
            f"{isa}: {missing} missing",
            "give the virtual machine its host's CPU (-cpu host)",
        )
    else:
        found, mend = f"{isa}: {missing} missing", "-"
    yield Finding(
        "kernel tier",
        found,
        f"more instructions a weight than {best} takes: prompts first, and decode in formats of few"
        " bits",
        mend,
    )


def _governor(root: Path, cpus: Sequence[int]) -> Iterator[Finding]:
    folders = [root / f"sys/devices/system/cpu/cpu{cpu}/cpufreq" for cpu in cpus]
    found = {text_of(folder / "scaling_governor") for folder in folders} - {"", "performance"}
    if found:
        yield Finding(
            "CPU governor",
            ", ".join(sorted(found)),
            "clocks fall while workers wait for a GPU or a disk, and are late to rise",
            "sudo cpupower frequency-set -g performance",
        )


def _huge_pages(root: Path) -> Iterator[Finding]:
    reserved = integer(root / "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages") or 0
    private = text_of(root / _THP / "enabled")
    if ("[never]" in private or not private) and not reserved:
        yield Finding(
            "huge pages",
            private or "not offered by this kernel",
            "cache, buffers and weights of --home arena lie in pages of 4 KiB: more page walks",
            f"echo madvise | sudo tee /{_THP}/enabled"
            if private
            else "sudo sysctl vm.nr_hugepages=N",
        )
    shared = text_of(root / _THP / "shmem_enabled")
    if any(f"[{word}]" in shared for word in ("never", "deny")):
        yield Finding(
            "huge pages, shared",
            shared,
            "weights of --home shared and the cache of prefill processes lie in pages of 4 KiB",
            f"echo advise | sudo tee /{_THP}/shmem_enabled",
        )


def _numa(root: Path) -> Iterator[Finding]:
    nodes = list((root / "sys/devices/system/node").glob("node[0-9]*"))
    on = integer(root / "proc/sys/kernel/numa_balancing") or 0
    if on and len(nodes) > 1:
        yield Finding(
            "NUMA balancing",
            f"on, with {len(nodes)} nodes",
            "the kernel takes pages from workers to see who reads them, and moves what is in place",
            "sudo sysctl kernel.numa_balancing=0",
        )


def _memory(root: Path, needs: Needs | None) -> Iterator[Finding]:
    total = _meminfo(root, "MemTotal")
    allowed = cgroup.memory(root)
    limit = total if allowed is None else allowed.limit
    usable = min(total, limit)
    if limit < total:
        yield Finding(
            "memory limit",
            f"{_gb(limit)} of {_gb(total)}, by a control group",
            "mapped weights count against it: what does not fit is dropped and read again",
            "raise memory.max and memory.high of the group, or docker run --memory",
        )
    if needs is not None and needs.weights + needs.rest > usable:
        over = needs.weights + needs.rest - usable
        yield Finding(
            "page cache",
            f"{_gb(usable)} for {_gb(needs.weights)} of weights and {_gb(needs.rest)} else",
            f"{_gb(over)} of weights are read from the disk again and again, by nearly every token",
            "hmc quantize, or hmc compile with a smaller --max-context",
        )


def _swap(root: Path) -> Iterator[Finding]:
    used = _meminfo(root, "SwapTotal") - _meminfo(root, "SwapFree")
    if used > 0:
        yield Finding(
            "swap",
            f"{_gb(used)} in use",
            "a step that meets such a page waits for the disk",
            "sudo swapoff -a",
        )


def _locked(root: Path) -> Iterator[Finding]:
    gpus = list((root / "dev").glob("nvidia[0-9]*"))
    found = re.search(r"^Max locked memory +(\d+)", text_of(root / "proc/self/limits"), re.M)
    if gpus and found and int(found[1]) < _meminfo(root, "MemTotal"):
        yield Finding(
            "locked memory",
            f"{_gb(int(found[1]))} at most",
            "a plan that streams more weights to a GPU is refused, since they cannot be pinned",
            "ulimit -l unlimited (for good: memlock in /etc/security/limits.conf)",
        )


def _meminfo(root: Path, name: str) -> int:
    """Bytes of a line of /proc/meminfo; 0 without it."""
    found = re.search(rf"^{name}: +(\d+) kB", text_of(root / "proc/meminfo"), re.M)
    return int(found[1]) * 1024 if found else 0


def _gb(count: int) -> str:
    return f"{count / 1e9:.1f} GB"
