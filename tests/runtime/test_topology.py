from pathlib import Path

import pytest

from hmc.machine.topology import Cache, read_topology, this_machine, worker_cpus


def write_tree(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n")
    return root


def dual_socket(root: Path, nodes: int = 2) -> Path:
    """2 x 32 cores with SMT as Linux numbers them: first siblings 0-63, second 64-127."""
    files: dict[str, str] = {}
    per_node = 64 // nodes
    for node in range(nodes):
        first = node * per_node
        files[f"node/node{node}/cpulist"] = (
            f"{first}-{first + per_node - 1},{first + 64}-{first + per_node + 63}"
        )
    for cpu in range(128):
        core = cpu % 64
        base = f"cpu/cpu{cpu}"
        files[f"{base}/topology/thread_siblings_list"] = f"{core},{core + 64}"
        files[f"{base}/cache/index0/type"] = "Data"
        files[f"{base}/cache/index0/level"] = "1"
        files[f"{base}/cache/index0/size"] = "32K"
        files[f"{base}/cache/index0/shared_cpu_list"] = f"{core},{core + 64}"
        files[f"{base}/cache/index1/type"] = "Instruction"
        files[f"{base}/cache/index1/level"] = "1"
        files[f"{base}/cache/index1/size"] = "32K"
        socket = core // 32
        files[f"{base}/cache/index3/type"] = "Unified"
        files[f"{base}/cache/index3/level"] = "3"
        files[f"{base}/cache/index3/size"] = "256M"
        files[f"{base}/cache/index3/shared_cpu_list"] = (
            f"{32 * socket}-{32 * socket + 31},{32 * socket + 64}-{32 * socket + 95}"
        )
    return write_tree(root, files)


def test_single_node_with_two_cores(tmp_path: Path) -> None:
    root = write_tree(
        tmp_path,
        {
            "node/node0/cpulist": "0-1",
            "cpu/cpu0/topology/thread_siblings_list": "0",
            "cpu/cpu1/topology/thread_siblings_list": "1",
            "cpu/cpu0/cache/index2/type": "Unified",
            "cpu/cpu0/cache/index2/level": "2",
            "cpu/cpu0/cache/index2/size": "1024K",
            "cpu/cpu0/cache/index2/shared_cpu_list": "0",
        },
    )
    found = read_topology(root, [0, 1])
    assert [node.id for node in found.nodes] == [0]
    assert found.cores == 2
    assert found.caches == (Cache(2, 1 << 20, (0,)),)
    assert found.worker_cpus(1) == [0]
    assert found.worker_cpus(2) == [0, 1]
    assert found.worker_cpus(4) == [0, 0, 1, 1]


def test_two_sockets_share_the_work(tmp_path: Path) -> None:
    found = read_topology(dual_socket(tmp_path), range(128))
    assert [len(node.cores) for node in found.nodes] == [32, 32]
    assert found.cores == 64
    assert (found.nodes[1].cores[8], found.nodes[0].cores[0]) == ((40, 104), (0, 64))
    assert found.worker_cpus(64) == list(range(64))
    # Half the workers on each node, in node order: contiguous slices are node-local.
    assert found.worker_cpus(32) == [*range(16), *range(32, 48)]
    assert found.worker_cpus(3) == [0, 1, 32]
    # Second siblings only once all cores of all nodes are taken.
    assert found.worker_cpus(66) == [*range(32), 64, *range(32, 64), 96]
    assert sorted(found.worker_cpus(128)) == list(range(128))
    assert found.last_level_bytes == 512 << 20
    assert {cache.level for cache in found.caches} == {1, 3}


def test_four_nodes_keep_workers_in_node_order(tmp_path: Path) -> None:
    found = read_topology(dual_socket(tmp_path, nodes=4), range(128))
    home = {cpu: node.id for node in found.nodes for core in node.cores for cpu in core}
    for threads in (1, 4, 7, 63, 64, 65, 100, 128, 131):
        cpus = found.worker_cpus(threads)
        nodes = [home[cpu] for cpu in cpus]
        assert len(cpus) == threads
        assert nodes == sorted(nodes)
        counts = [nodes.count(node) for node in range(4)]
        assert max(counts) - min(counts) <= 1


def test_a_container_sees_only_its_mask(tmp_path: Path) -> None:
    found = read_topology(dual_socket(tmp_path), [3, 40, 67, 41, 42])
    assert [node.cores for node in found.nodes] == [((3, 67),), ((40,), (41,), (42,))]
    assert found.cpus == (3, 40, 41, 42, 67)
    assert found.worker_cpus(4) == [3, 40, 41, 42]
    assert found.worker_cpus(5) == [3, 67, 40, 41, 42]


def test_a_node_without_usable_cpus_is_left_out(tmp_path: Path) -> None:
    found = read_topology(dual_socket(tmp_path), range(32, 36))
    assert [node.id for node in found.nodes] == [1]
    assert found.worker_cpus(2) == [32, 33]


def test_memory_only_nodes_are_left_out(tmp_path: Path) -> None:
    root = write_tree(tmp_path, {"node/node0/cpulist": "0-1", "node/node1/cpulist": ""})
    assert [node.id for node in read_topology(root, [0, 1]).nodes] == [0]


def test_missing_sys_means_plain_cores_on_one_node(tmp_path: Path) -> None:
    found = read_topology(tmp_path / "absent", [0, 2, 5])
    assert found.worker_cpus(3) == [0, 2, 5]
    assert found.caches == ()
    assert found.last_level_bytes == 0


def test_this_machine_gives_only_usable_cpus() -> None:
    cpus = this_machine().cpus
    assert set(worker_cpus(len(cpus))) == set(cpus)
    with pytest.raises(ValueError, match="positive"):
        worker_cpus(0)
