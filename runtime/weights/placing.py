"""Weights on the NUMA nodes whose workers multiply them.

Kernels split a matrix by its rows over all workers, and the workers of a node are neighbours
(`Pool.teams`): so the rows of a node are one range of every matrix. A matrix stays one range of
addresses, whatever lies where: threads of each node touch their part of it first, before anything
is read into it. Where parts of two nodes meet, a page of 4 KiB is of the node that has more of it.
Parts that hold whole huge pages get them; the rest of such parts, and smaller ones, are pages of
4 KiB, since a huge page of two nodes would be remote to one of them.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt

from hmc.machine.detect import node_free_bytes
from hmc.machine.topology import Team
from hmc.plan import Plan
from hmc.plan.nodes import first_rows, shares
from hmc.runtime.memory import nodes
from hmc.runtime.memory.blocks import HUGE_PAGE, PAGE, Block
from hmc.runtime.weights.tensors import Addresses, Key, TensorGroup

_PIECE = 64 << 20
"""Bytes that a thread touches at a time."""


class Regions:
    """Which team's each page of a block is: region i begins at address `starts[i]` and is of team
    `owners[i]`; the last one ends at `end`."""

    def __init__(self, starts: Addresses, owners: Addresses, end: int) -> None:
        self.starts, self.owners, self.end = starts, owners, end

    @staticmethod
    def of(
        block: Block,
        groups: Sequence[TensorGroup],
        places: Mapping[Key, Addresses],
        teams: Sequence[Team],
    ) -> Regions:
        """Of the tensors of `groups` at their addresses `places` in a block."""
        unit = HUGE_PAGE if block.pages == "reserved" else PAGE
        workers = [len(team.cpus) for team in teams]
        starts, owners = [np.array([block.address])], [np.array([0])]
        for group in groups:
            for team, row in enumerate(first_rows(group.rows, workers)[:-1]):
                starts.append(places[group.key] + group.form.bytes * row // group.rows)
                owners.append(np.full(len(group.shards), team))
        begin, owner = np.concatenate(starts), np.concatenate(owners)
        begin = (begin + unit // 2) // unit * unit
        begin[0] = block.address
        order = np.argsort(begin, kind="stable")
        begin, owner = begin[order], owner[order]
        last = np.append(begin[1:] != begin[:-1], True)  # of equal ones
        begin, owner = begin[last], owner[last]
        new = np.insert(owner[1:] != owner[:-1], 0, True)
        return Regions(begin[new], owner[new], block.address + block.span)

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """(begin, end, team) of each region."""
        ends = np.append(self.starts[1:], self.end)
        return zip(self.starts.tolist(), ends.tolist(), self.owners.tolist(), strict=True)

    def cut(self, begin: int, end: int) -> Iterator[tuple[int, int, int]]:
        """(begin, end, team) of the parts of [begin, end)."""
        at = int(np.searchsorted(self.starts, begin, "right")) - 1
        while begin < end:
            stop = int(self.starts[at + 1]) if at + 1 < len(self.starts) else self.end
            yield begin, min(end, stop), int(self.owners[at])
            begin, at = stop, at + 1

    def team(self, address: int) -> int:
        """The team of a byte."""
        return int(self.owners[np.searchsorted(self.starts, address, "right") - 1])

    def bytes(self, teams: int) -> npt.NDArray[np.int64]:
        """Bytes of each team."""
        sizes = np.diff(np.append(self.starts, self.end))
        return np.bincount(self.owners, sizes, teams).astype(np.int64)


@dataclass(frozen=True)
class Placed:
    """A block whose pages lie where `regions` say; `told` says so in words."""

    teams: tuple[Team, ...]
    regions: Regions
    told: str


def place(block: Block, regions: Regions, teams: tuple[Team, ...]) -> Placed:
    """Have the pages of a block, which nobody has touched, taken by threads of their teams."""
    sizes: Counter[int] = Counter()
    for team, size in zip(teams, regions.bytes(len(teams)).tolist(), strict=True):
        sizes[team.memory] += size
    told, strict, refused = [], {}, set[str]()
    for node, size in sizes.items():
        free = node_free_bytes(node)
        strict[node] = size <= free
        told.append(f"node {node} {size / 2**30:.2f} GiB")
        if size > free:
            told[-1] += f" ({free / 2**30:.2f} have room there, the rest lies elsewhere)"

    def begin(number: int) -> None:
        pin(teams[number])
        try:
            node = teams[number].memory
            nodes.take_from(node, strictly=strict[node])
        except nodes.NotAllowedError as why:
            refused.add(str(why))

    with crews(teams, begin) as crew:
        if block.pages == "advised":
            nodes.huge(block.address, block.span, wanted=False)
            done(crew(task, team) for task, team in _touch(_edges(regions)))
            for first, last in _holders(regions):
                nodes.huge(first, last - first, wanted=True)
            done(crew(task, team) for task, team in _touch(_insides(regions)))
            # What is there stays; the kernel would join pages of two nodes to huge ones.
            nodes.huge(block.address, block.span, wanted=False)
        else:
            done(crew(task, team) for task, team in _touch(regions))
    try:
        nodes.hold(block.address, block.span, {team.memory for team in teams})
    except nodes.NotAllowedError as why:
        refused.add(str(why))
    how = f"by first touch: {', '.join(sorted(refused))}" if refused else "bound"
    return Placed(teams, regions, f"weights by rows on {', '.join(told)}; {how}")


def differing(plan: Plan, teams: Sequence[Team]) -> str:
    """What is to be said where workers are not on the nodes that a plan says."""
    planned = [(each.memory, each.workers) for each in shares(plan.machine, plan.threads)]
    if len(teams) < 2 or planned == [(team.memory, len(team.cpus)) for team in teams]:
        return ""
    return "planned: " + ", ".join(f"{count} workers on node {node}" for node, count in planned)


Task = Callable[[], None]
Crew = Callable[[Task, int], Future[None]]


def pin(team: Team) -> None:
    """Keep this thread on the CPUs of a team's workers."""
    os.sched_setaffinity(0, set(team.cpus))


@contextmanager
def crews(teams: Sequence[Team], begin: Callable[[int], None]) -> Iterator[Crew]:
    """A function that has a task done by one of a team's threads, of which there are as many as the
    team has CPUs; each begins with `begin`, which is told the team's number."""
    with ExitStack() as stack:
        pools = [
            stack.enter_context(
                ThreadPoolExecutor(len(set(team.cpus)), f"hmc-node{team.node}", begin, (number,))
            )
            for number, team in enumerate(teams)
        ]
        yield lambda task, team: pools[team].submit(task)


def done(pending: Iterable[Future[None]]) -> None:
    """Wait for all, once all have begun."""
    for each in list(pending):
        each.result()


def _touch(parts: Iterable[tuple[int, int, int]]) -> Iterator[tuple[Task, int]]:
    for begin, end, team in parts:
        for at in range(begin, end, _PIECE):
            yield partial(nodes.populate, at, min(_PIECE, end - at)), team


def _whole(begin: int, end: int) -> tuple[int, int]:
    """The huge pages that lie in [begin, end) whole; none: both are `end`."""
    first, last = -(-begin // HUGE_PAGE) * HUGE_PAGE, end // HUGE_PAGE * HUGE_PAGE
    return (first, last) if first < last else (end, end)


def _insides(regions: Regions) -> Iterator[tuple[int, int, int]]:
    for begin, end, team in regions:
        first, last = _whole(begin, end)
        if first < last:
            yield first, last, team


def _edges(regions: Regions) -> Iterator[tuple[int, int, int]]:
    for begin, end, team in regions:
        first, last = _whole(begin, end)
        for low, high in ((begin, first), (last, end)):
            if low < high:
                yield low, high, team


def _holders(regions: Regions) -> Iterator[tuple[int, int]]:
    """Runs of regions that hold whole huge pages."""
    run: tuple[int, int] | None = None
    for begin, end, _ in regions:
        first, last = _whole(begin, end)
        if first < last:
            run = (run[0] if run else begin, end)
        elif run:
            yield run
            run = None
    if run:
        yield run
