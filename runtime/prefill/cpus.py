"""Divides a machine's cores between decoding and a prefill process beside it; hides rounding."""

from __future__ import annotations

from hmc.errors import MachineError
from hmc.machine.topology import Topology


def divide_cpus(
    topology: Topology, threads: int, share: float
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(CPUs of decoding, CPUs of prefill) out of those that `threads` workers would take; `share`
    of the cores, 0 to 1, go to prefill, at least one to either side.

    SMT siblings stay on one side. Both sides get their part of every NUMA node, as far as whole
    cores allow: each then reads weights with the bandwidth of all nodes. A node's CPUs are next to
    each other, as a pool expects. `MachineError` when there are fewer than two cores.
    """
    if not 0 < share < 1:
        raise ValueError(f"share must lie between 0 and 1, not {share}")
    chosen = set(topology.worker_cpus(threads))
    nodes = [
        [mine for core in node.cores if (mine := [cpu for cpu in core if cpu in chosen])]
        for node in topology.nodes
    ]
    cores = sum(map(len, nodes))
    if cores < 2:
        raise MachineError(
            f"a prefill process beside decoding needs two cores, {cores} can be used: give more"
            " threads, or prefill and decode in one process"
        )
    counts = _apportion([len(node) for node in nodes], max(1, min(cores - 1, round(share * cores))))
    decode = [core for node, count in zip(nodes, counts, strict=True) for core in node[count:]]
    prefill = [core for node, count in zip(nodes, counts, strict=True) for core in node[:count]]
    return _flat(decode), _flat(prefill)


def _apportion(sizes: list[int], wanted: int) -> list[int]:
    """`wanted` split in proportion to `sizes`, whole; the largest remainders are rounded up."""
    total = sum(sizes)
    counts = [wanted * size // total for size in sizes]
    order = sorted(range(len(sizes)), key=lambda i: (-(wanted * sizes[i] % total), i))
    for i in order[: wanted - sum(counts)]:
        counts[i] += 1
    return counts


def _flat(cores: list[list[int]]) -> tuple[int, ...]:
    return tuple(cpu for core in cores for cpu in core)
