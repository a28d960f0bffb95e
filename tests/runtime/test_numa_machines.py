"""What is planned for machines of several NUMA nodes as their /sys describes them.

numa_machines.txt holds what of recordings in hwloc's test suite (tests/hwloc/linux) is read here:
CPUs that may be used (their cpuset's, and online), how many siblings a core has and how far apart
their numbers are, the memory that the cpuset allows where it says so; CPUs, memory and distances of
every node.
"""

import re
from itertools import groupby
from pathlib import Path

import pytest
from plain_machine import MACHINE

from hmc.machine.detect import numa_nodes
from hmc.machine.topology import Topology, read_topology
from hmc.plan.nodes import shares, strangers
from hmc.ranges import parse, ranges

TABLE = Path(__file__).with_name("numa_machines.txt")
_MACHINE = re.compile(r"machine (\S+) cpus (\S+) siblings (\d+) apart (\d+)(?: memory (\S+))?")
_NODE = re.compile(r"node (\d+) cpus (\S+) kB (\d+) distances ?(.*)")

PLANNED = {
    # name: workers, and (node that works, node whose memory it uses, workers) of each
    "128arm-2pa2n8cluster4co": "128: 0 in 0 x 32, 1 in 1 x 32, 2 in 2 x 32, 3 in 3 x 32",
    "32intel64-2p8co2t+8ve": "16: 0 in 0 x 8, 1 in 1 x 8",
    "40intel64-4n10c+pci-conflicts": "40: 0 in 0 x 10, 1 in 1 x 10, 2 in 2 x 10, 3 in 3 x 10",
    "48amd64-4pa2n6c-sparse": "48: 0 in 0 x 6, 1 in 1 x 6, 2 in 2 x 6, 33 in 33 x 6,"
    " 34 in 34 x 6, 45 in 45 x 6, 72 in 72 x 6, 73 in 73 x 6",
    "64amd64-4s2n4ca2co": "8: 0 in 0 x 1, 1 in 1 x 1, 2 in 2 x 1, 3 in 3 x 1,"
    " 4 in 4 x 1, 5 in 5 x 1, 6 in 6 x 1, 7 in 7 x 1",
    "256ppc-8n8s4t": "64: 0 in 0 x 8, 1 in 1 x 8, 4 in 4 x 8, 5 in 5 x 8,"
    " 8 in 8 x 8, 9 in 9 x 8, 12 in 12 x 8, 13 in 13 x 8",
    # a cpuset with the CPUs of nodes whose memory it does not allow; one CPU is offline
    "16amd64-8n2c-cpusets": "10: 0 in 1 x 2, 1 in 1 x 2, 2 in 2 x 1, 3 in 3 x 1, 6 in 1 x 2,"
    " 7 in 1 x 2",
    "16amd64-4n4c-cgroup-distance-merge": "4: 0 in 2 x 4",
    # uneven parts of a job
    "32amd64-4s2n4c-cgroup2": "6: 0 in 0 x 4, 1 in 1 x 2",
    # CPUs without memory of their own, and memory without CPUs
    "fakememinitiators-1np2c+1npp+gi": "8: 0 in 5 x 2, 1 in 8 x 2, 2 in 6 x 2, 3 in 9 x 2",
    "fakeheteromemtiers": "6: 0 in 0 x 2, 1 in 1 x 2, 2 in 2 x 2",
    # memory of GPUs as nodes; most CPUs offline
    "nvidiagpunumanodes": "8: 0 in 0 x 4, 8 in 8 x 4",
    "memorysidecaches": "6: 0 in 0 x 2, 1 in 1 x 2, 2 in 2 x 1, 3 in 3 x 1",
    # every node claims all CPUs
    "8em64t-2s2ca2c-buggynuma": "8: 0 in 0 x 8",
}


def tree(name: str, root: Path) -> Topology:
    """The folders of a recording, read."""
    rows = TABLE.read_text().splitlines()
    begin = next(i for i, row in enumerate(rows) if row.startswith(f"machine {name} "))
    about = _MACHINE.fullmatch(rows[begin])
    assert about is not None
    usable, count, apart = parse(about[2]), int(about[3]), int(about[4])
    for cpu in usable:
        first = cpu // (count * apart) * count * apart + cpu % apart
        write(
            root / f"cpu/cpu{cpu}/topology/thread_siblings_list",
            ranges(first + i * apart for i in range(count)),
        )
    for row in rows[begin + 1 :]:
        if (node := _NODE.fullmatch(row)) is None:
            break
        folder = root / f"node/node{node[1]}"
        write(folder / "cpulist", "" if node[2] == "-" else node[2])
        write(folder / "meminfo", f"Node {node[1]} MemTotal: {node[3]} kB")
        write(folder / "distance", node[4])
    return read_topology(root, usable, parse(about[5] or ""))


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


@pytest.mark.parametrize("name", PLANNED)
def test_rows_are_planned_where_workers_are(name: str, tmp_path: Path) -> None:
    found = tree(name, tmp_path)
    threads, _, planned = PLANNED[name].partition(": ")
    cpus = found.worker_cpus(int(threads))
    teams = found.teams(cpus)
    told = ", ".join(f"{team.node} in {team.memory} x {len(team.cpus)}" for team in teams)
    assert told == planned
    assert [cpu for team in teams for cpu in team.cpus] == cpus
    # the plan, which knows a machine file alone, says the same of any number of workers
    machine = MACHINE.model_copy(update={"nodes": numa_nodes(found, 1 << 40, tmp_path)})
    for count in (1, 2, 5, len(found.cpus), 2 * len(found.cpus) + 1):
        pinned = found.teams(found.worker_cpus(count))
        own = shares(machine, count)
        assert [(each.node, each.memory, each.workers) for each in own] == [
            (team.node, team.memory, len(team.cpus)) for team in pinned
        ]


def test_nodes_stand_in_order_with_cpus_of_their_own(tmp_path: Path) -> None:
    found = tree("40intel64-4n10c+pci-conflicts", tmp_path)
    cpus = found.worker_cpus(40)
    assert [key for key, _ in groupby(cpus, lambda cpu: cpu % 4)] == [0, 1, 2, 3]


def test_what_crosses_between_nodes(tmp_path: Path) -> None:
    def crossing(name: str, threads: int) -> float:
        found = tree(name, tmp_path / name)
        nodes = numa_nodes(found, 1 << 40, tmp_path / name)
        return strangers(shares(MACHINE.model_copy(update={"nodes": nodes}), threads))

    assert crossing("32intel64-2p8co2t+8ve", 16) == 0.5
    assert crossing("32amd64-4s2n4c-cgroup2", 6) == pytest.approx(1 - (4 / 6) ** 2 - (2 / 6) ** 2)
    # four teams share the memory of one node
    assert crossing("16amd64-8n2c-cpusets", 10) == pytest.approx(1 - (8**2 + 1 + 1) / 10**2)
    assert crossing("8em64t-2s2ca2c-buggynuma", 8) == 0
