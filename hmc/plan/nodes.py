"""What of a plan lies on which NUMA node, and which bytes cross between nodes.

Workers are numbered node by node, and kernels split the rows of a matrix by worker number in groups
of `GRAIN`: the rows of a node's workers are one range of every matrix. They lie in the node's
memory (runtime/weights/placing.py); cache and activations, which everybody reads, lie on all nodes
by turns. All follows from the machine's nodes and the number of workers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from hmc.codegen.decode.grain import GRAIN
from hmc.formats import matrix_of
from hmc.machine.model import Machine
from hmc.machine.topology import worker_counts
from hmc.plan.model import Plan
from hmc.ranges import expert_ranges


@dataclass(frozen=True)
class Share:
    """The `workers` of a node, and the node whose `memory` holds their rows."""

    node: int
    memory: int
    workers: int


def shares(machine: Machine, threads: int) -> tuple[Share, ...]:
    """Of `threads` workers those of each node, in the order of their numbers; as
    `Topology.worker_cpus` gives them CPUs.
    """
    nodes = [node for node in machine.nodes if node.cpus]
    if not nodes:
        return (Share(0, 0, threads),)
    sizes = [(node.cores or len(node.cpus), len(node.cpus)) for node in nodes]
    counts = worker_counts(threads, sizes)
    return tuple(
        Share(node.id, node.home, count) for node, count in zip(nodes, counts, strict=True) if count
    )


def first_rows(rows: int, workers: Sequence[int]) -> list[int]:
    """Where the rows of each node's `workers` begin in a matrix of `rows`, and where the last ones
    end: as `Emitter.split` gives them to the workers in groups of `GRAIN`."""
    groups, total = -(-rows // GRAIN), sum(workers)
    return [min(rows, groups * begin // total * GRAIN) for begin in accumulate(workers, initial=0)]


def weight_bytes(plan: Plan) -> dict[int, int]:
    """Stored bytes of weights that the host keeps, by the node whose memory they are in."""
    own = shares(plan.machine, plan.threads)
    workers = [each.workers for each in own]
    found = {each.memory: 0 for each in own}
    hosted = {each.layer: len(expert_ranges(each.tiers.get("host", ""))) for each in plan.placement}
    used = {
        name
        for phase in plan.phases
        for step in phase.steps
        if step.resource == "cpu"
        for name in step.weights.values()
    }
    sizes = [
        (matrix_of(weight.shape)[0], weight.bytes) for weight in plan.weights if weight.name in used
    ]
    sizes += [(matrix_of(each.shape)[0], each.bytes * hosted[each.layer]) for each in plan.experts]
    for rows, size in sizes:
        edges = first_rows(rows, workers)
        for share, begin, end in zip(own, edges, edges[1:], strict=False):
            found[share.memory] += size * end // rows - size * begin // rows
    return found


def strangers(own: Sequence[Share]) -> float:
    """Of bytes that workers read without regard to nodes the part that others keep: a node with
    share s of the workers has s of the bytes, so 1 - sum of s^2."""
    total = sum(share.workers for share in own)
    homes: dict[int, int] = {}
    for share in own:
        homes[share.memory] = homes.get(share.memory, 0) + share.workers
    return 1 - sum((count / total) ** 2 for count in homes.values())
