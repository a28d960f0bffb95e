"""The machine as /sys describes it: NUMA nodes, cores with their SMT siblings, caches; hides the
files' formats.

Only CPUs of the process's affinity mask exist here, and only memory of nodes that its cpuset
allows, so a container with half a socket looks like half a socket. Where /sys is absent or partial,
every CPU is a core of its own on node 0, and every node has memory.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path

from hmc.files import text_of
from hmc.ranges import parse

SYS = Path("/sys/devices/system")


@dataclass(frozen=True)
class Cache:
    """One data or unified cache: `cpus` of the mask share its `bytes`."""

    level: int
    bytes: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Node:
    """One NUMA node; `cores` are tuples of SMT siblings, lowest CPU first, in order of that CPU.
    `memory` is the node that its CPUs take pages from: itself, or where it has no memory that may
    be used the nearest one that has.
    """

    id: int
    cores: tuple[tuple[int, ...], ...]
    memory: int

    @property
    def cpus(self) -> tuple[int, ...]:
        """Its usable CPUs, ascending."""
        return tuple(sorted(cpu for core in self.cores for cpu in core))


@dataclass(frozen=True)
class Team:
    """The workers of one node, neighbours of each other; `cpus[i]` is where the i-th one stays."""

    node: int
    memory: int
    cpus: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Nodes that have a usable CPU, in order of their id, and the caches of those CPUs."""

    nodes: tuple[Node, ...]
    caches: tuple[Cache, ...]

    @property
    def cores(self) -> int:
        """Physical cores with a usable CPU."""
        return sum(len(node.cores) for node in self.nodes)

    @property
    def cpus(self) -> tuple[int, ...]:
        """Usable CPUs, ascending."""
        return tuple(sorted(cpu for node in self.nodes for cpu in node.cpus))

    @property
    def last_level_bytes(self) -> int:
        """All caches of the highest level together; 0 when unknown."""
        top = max((cache.level for cache in self.caches), default=0)
        return sum(cache.bytes for cache in self.caches if cache.level == top)

    def worker_cpus(self, threads: int) -> list[int]:
        """The CPU of each of `threads` workers; neighbouring workers share a node, nodes get equal
        parts of the work.

        A node's workers take one CPU of every physical core before second siblings, and CPUs repeat
        (next to each other) only when there are more workers than CPUs.
        """
        counts = worker_counts(threads, [(len(node.cores), len(node.cpus)) for node in self.nodes])
        return [
            cpu
            for node, count in zip(self.nodes, counts, strict=True)
            for cpu in _spread(node, count)
        ]

    def teams(self, cpus: Sequence[int]) -> tuple[Team, ...]:
        """Workers on `cpus` by node, in their order. CPUs that are not usable belong to the first
        node."""
        homes = {cpu: node for node in self.nodes for cpu in node.cpus}
        first = self.nodes[0]
        return tuple(
            Team(node.id, node.memory, tuple(own))
            for node, own in groupby(cpus, lambda cpu: homes.get(cpu, first))
        )


def worker_counts(threads: int, nodes: Sequence[tuple[int, int]]) -> list[int]:
    """How many of `threads` workers each node has, by its (cores, CPUs)."""
    if threads < 1:
        raise ValueError(f"threads must be positive, not {threads}")
    counts = [0] * len(nodes)
    for _ in range(threads):
        # The emptiest node relative to its cores; then to its CPUs, so that siblings fill up
        # evenly too.
        chosen = min(
            range(len(counts)),
            key=lambda i: (
                counts[i] // nodes[i][1],
                counts[i] >= nodes[i][0],
                (counts[i] % nodes[i][1]) / nodes[i][0],
                i,
            ),
        )
        counts[chosen] += 1
    return counts


def read_topology(
    root: Path = SYS, allowed: Iterable[int] | None = None, memory: Iterable[int] | None = None
) -> Topology:
    """The topology under `root` limited to `allowed` CPUs (default: the process's affinity mask)
    and the `memory` of some nodes (default: those that the process's cpuset allows)."""
    usable = sorted(os.sched_getaffinity(0) if allowed is None else allowed)
    cores: dict[tuple[int, ...], list[int]] = {}
    for cpu in usable:
        siblings = parse(text_of(root / f"cpu/cpu{cpu}/topology/thread_siblings_list")) or [cpu]
        cores.setdefault(tuple(siblings), []).append(cpu)
    nodes: dict[int, list[tuple[int, ...]]] = {}
    home = _homes(root)
    for members in cores.values():
        nodes.setdefault(home.get(members[0], 0), []).append(tuple(members))
    allowed_memory = _allowed_memory() if memory is None else set(memory)
    return Topology(
        tuple(
            Node(number, tuple(sorted(found)), _nearest(root, number, allowed_memory))
            for number, found in sorted(nodes.items())
        ),
        _caches(root, usable),
    )


@cache
def this_machine() -> Topology:
    """`read_topology()` as it was when first asked for."""
    return read_topology()


def worker_cpus(threads: int) -> list[int]:
    """`Topology.worker_cpus` of this machine."""
    return this_machine().worker_cpus(threads)


def _spread(node: Node, count: int) -> list[int]:
    deepest = max(len(core) for core in node.cores)
    order = [core[i] for i in range(deepest) for core in node.cores if i < len(core)]
    repeats, extra = divmod(count, len(order))
    return [cpu for i, cpu in enumerate(order) for _ in range(repeats + (i < extra))]


def _homes(root: Path) -> dict[int, int]:
    """CPU -> node id; the lowest one of several that claim it."""
    found: dict[int, int] = {}
    for number, folder in _folders(root).items():
        for cpu in parse(text_of(folder / "cpulist")):
            found.setdefault(cpu, number)
    return found


def _allowed_memory() -> set[int]:
    """Nodes whose memory the process may use; empty where the kernel does not say."""
    found = re.search(r"^Mems_allowed_list:\s*(\S+)$", text_of(Path("/proc/self/status")), re.M)
    return set(parse(found[1])) if found else set()


def _folders(root: Path) -> dict[int, Path]:
    """Of every node that is online, in order of their ids."""
    found = (root / "node").glob("node[0-9]*")
    return dict(sorted((int(folder.name.removeprefix("node")), folder) for folder in found))


def memory_of(folder: Path) -> int | None:
    """Bytes of a node's memory; None where its folder does not tell."""
    found = re.search(r"MemTotal:\s*(\d+) kB", text_of(folder / "meminfo"))
    return int(found[1]) * 1024 if found else None


def _nearest(root: Path, node: int, allowed: set[int]) -> int:
    """Where a node's CPUs take pages from, of the nodes with memory that are `allowed` (none: all).
    Its distances are to all nodes that are online, in order of their ids."""
    folders = _folders(root)
    having = [
        other
        for other, folder in folders.items()
        if memory_of(folder) != 0 and (not allowed or other in allowed)
    ]
    if not having or node in having:
        return node
    row = map(int, text_of(folders[node] / "distance").split())
    away = dict(zip(folders, row, strict=False))
    return min(having, key=lambda other: (away.get(other, 0), other))


def _caches(root: Path, usable: list[int]) -> tuple[Cache, ...]:
    found: set[Cache] = set()
    for cpu in usable:
        for folder in (root / f"cpu/cpu{cpu}/cache").glob("index[0-9]*"):
            if text_of(folder / "type") not in ("Data", "Unified"):
                continue
            sharing = set(parse(text_of(folder / "shared_cpu_list"))) or {cpu}
            cpus = tuple(sorted(sharing & set(usable)))
            level, size = text_of(folder / "level"), text_of(folder / "size")
            if level.isdigit() and size:
                found.add(Cache(int(level), _size(size), cpus))
    return tuple(sorted(found, key=lambda entry: (entry.level, entry.cpus)))


def _size(text: str) -> int:
    """`32768K` as bytes."""
    scale = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
    return int(text[:-1]) * scale[text[-1]] if text[-1] in scale else int(text)
