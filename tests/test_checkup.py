"""What `hmc doctor` finds on machines that are trees of files."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

import hmc
from hmc import cgroup, cli, env
from hmc.codegen.isa import TIERS
from hmc.errors import UsageError
from hmc.machine import checkup
from hmc.machine.checkup import Finding, Needs

THP = "sys/kernel/mm/transparent_hugepage"
GOVERNOR = "sys/devices/system/cpu/cpu{}/cpufreq/scaling_governor"
FLAGS = " ".join(TIERS["avx2"].flags)
CPUS = (0, 1, 2, 3)

WELL = {
    "proc/cpuinfo": f"flags\t: {FLAGS}\n",
    "proc/meminfo": "MemTotal: 64000000 kB\nSwapTotal: 0 kB\nSwapFree: 0 kB\n",
    "proc/self/cgroup": "0::/box/own\n",
    "proc/self/limits": "Max locked memory         8388608              8388608        bytes\n",
    "proc/sys/kernel/numa_balancing": "1\n",
    "sys/devices/system/node/node0/cpulist": "0-3\n",
    f"{THP}/enabled": "always [madvise] never\n",
    f"{THP}/shmem_enabled": "always within_size [advise] never\n",
    **{GOVERNOR.format(cpu): "performance\n" for cpu in CPUS},
}
"""A machine on which nothing hurts: what is wrong with it needs a second node or a GPU to hurt."""

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A tree of WELL, and other files ("": none) by their paths."""

    def write(files: dict[str, str]) -> Path:
        for name, text in {**WELL, **files}.items():
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            if text:
                path.write_text(text)
        return tmp_path

    return write


def test_a_machine_that_is_well(machine: Machine) -> None:
    assert checkup.checkup(CPUS, machine({}), "avx512_bf16", Needs(60 * 10**9, 10**9)) == []


V2 = "sys/fs/cgroup/box"
V1 = {"proc/self/cgroup": "4:memory:/box\n3:cpu,cpuacct:/box/own\n0::/\n"}
CASES: list[tuple[str, dict[str, str], str, str]] = [
    ("CPU quota", {f"{V2}/cpu.max": "250000 100000\n"}, "2.5 CPUs' time for 4", "--cpus"),
    (
        "CPU quota",
        {
            **V1,
            "sys/fs/cgroup/cpu/box/cpu.cfs_quota_us": "50000\n",
            "sys/fs/cgroup/cpu/box/cpu.cfs_period_us": "100000\n",
            "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
        },
        "0.5 CPUs' time",
        "cpu.max",
    ),
    ("memory limit", {f"{V2}/own/memory.max": "8000000000\n"}, "8.0 GB of 65.5 GB", "memory.max"),
    (
        "memory limit",
        {**V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9000000000\n"},
        "9.0 GB",
        "--memory",
    ),
    ("CPU governor", {GOVERNOR.format(2): "powersave\n"}, "powersave", "-g performance"),
    ("huge pages", {f"{THP}/enabled": "always madvise [never]\n"}, "[never]", "tee /sys/kernel/mm"),
    ("huge pages", {f"{THP}/enabled": ""}, "not offered", "nr_hugepages"),
    ("huge pages, shared", {f"{THP}/shmem_enabled": "always [never]\n"}, "[never]", "advise"),
    ("NUMA balancing", {"sys/devices/system/node/node1/cpulist": "4\n"}, "2 nodes", "balancing=0"),
    (
        "swap",
        {"proc/meminfo": "MemTotal: 64000000 kB\nSwapTotal: 2000000 kB\nSwapFree: 500000 kB\n"},
        "1.5 GB in use",
        "swapoff",
    ),
    ("locked memory", {"dev/nvidia0": "-"}, "0.0 GB", "ulimit -l"),
]


@pytest.mark.parametrize(("item", "files", "found", "mend"), CASES)
def test_what_hurts(
    machine: Machine, item: str, files: dict[str, str], found: str, mend: str
) -> None:
    (finding,) = checkup.checkup(CPUS, machine(files), "avx512_bf16")
    assert finding.item == item and found in finding.found and mend in finding.mend
    assert finding.cost


def test_what_hurts_no_more(machine: Machine) -> None:
    """Huge pages that are reserved, a quota of as many CPUs, and groups without a limit."""
    root = machine(
        {
            f"{THP}/enabled": "[never]\n",
            "sys/kernel/mm/hugepages/hugepages-2048kB/nr_hugepages": "512\n",
            f"{V2}/cpu.max": "400000 100000\n",
            f"{V2}/own/cpu.max": "max 100000\n",
            f"{V2}/memory.max": "max\n",
        }
    )
    assert checkup.checkup(CPUS, root) == []


def test_missing_tiers(machine: Machine) -> None:
    def finding(flags: str, isa: str) -> Finding:
        root = machine({"proc/cpuinfo": f"flags\t: {flags}\n"})
        (found,) = checkup.checkup(CPUS, root, isa)
        return found

    assert "avx512_bf16" in finding(FLAGS, "avx2").found and finding(FLAGS, "avx2").mend == "-"
    assert "-cpu host" in finding(f"{FLAGS} hypervisor", "avx2").mend
    capped = finding(" ".join(TIERS["avx512"].flags), "avx2")
    assert capped.mend == "unset HMC_ISA" and "avx512 is there" in capped.found


def test_a_plan_that_the_page_cache_cannot_hold(machine: Machine) -> None:
    root = machine({})
    (finding,) = checkup.checkup(CPUS, root, needs=Needs(65 * 10**9, 2 * 10**9))
    assert finding.item == "page cache" and finding.cost.startswith("1.5 GB of weights")


def test_the_tightest_group_counts(machine: Machine) -> None:
    root = machine(
        {
            f"{V2}/memory.max": "9000\n",
            f"{V2}/memory.current": "8000\n",
            f"{V2}/memory.stat": "anon 1\nshmem 500\ninactive_file 1000\nactive_file 2500\n"
            "file_dirty 400\nfile_writeback 100\nunevictable 900\n",
            f"{V2}/own/memory.max": "7000\n",
            f"{V2}/own/memory.current": "1000\n",
        }
    )
    assert cgroup.memory(root) == cgroup.Memory(limit=7000, left=4000)
    v1 = {"memory.limit_in_bytes": "6000\n", "memory.usage_in_bytes": "5000\n"}
    stat = "inactive_file 1\nactive_file 9\ntotal_inactive_file 200\ntotal_active_file 350\n"
    stat += "total_dirty 50\ntotal_unevictable 70\n"
    files = {f"sys/fs/cgroup/memory/box/{name}": text for name, text in v1.items()}
    root = machine({**V1, **files, "sys/fs/cgroup/memory/box/memory.stat": stat})
    assert cgroup.memory(root) == cgroup.Memory(limit=6000, left=1500)


def test_memory_high_limits_where_it_is_below_memory_max(machine: Machine) -> None:
    files = {f"{V2}/memory.max": "9000\n", f"{V2}/memory.current": "1000\n"}
    root = machine({**files, f"{V2}/memory.high": "max\n"})
    assert cgroup.memory(root) == cgroup.Memory(limit=9000, left=8000)
    root = machine({**files, f"{V2}/memory.high": "6000\n"})
    assert cgroup.memory(root) == cgroup.Memory(limit=6000, left=5000)
    root = machine({**files, f"{V2}/memory.max": "max\n", f"{V2}/memory.high": "7000\n"})
    assert cgroup.memory(root) == cgroup.Memory(limit=7000, left=6000)


@pytest.mark.parametrize(
    ("quotas", "threads"),
    [
        ({}, 4),
        ({"own": "max 100000"}, 4),
        ({"own": "900000 100000"}, 4),
        ({"own": "250000 100000"}, 2),
        ({"own": "50000 100000"}, 1),
        ({"own": "300000 100000", "": "299999 100000"}, 2),
    ],
)
def test_a_quota_limits_threads(
    machine: Machine, monkeypatch: pytest.MonkeyPatch, quotas: dict[str, str], threads: int
) -> None:
    """Of every group on the way up, rounded down, at least one, at most the mask."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(CPUS))
    root = machine({str(Path(V2) / name / "cpu.max"): text for name, text in quotas.items()})
    assert env.usable_cpus(root) == threads


def test_who_says_how_many_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a plan was asked to have, else HMC_THREADS, else what the process may use: not what
    the machine had on which it was made."""
    folder = Path(__file__).parents[1] / "examples/configs/qwen3-30b-a3b-fp8"
    plan = hmc.compile(folder, dummy_weights=True, layers=1)
    monkeypatch.setattr(env, "usable_cpus", lambda: 3)
    monkeypatch.delenv("HMC_THREADS", raising=False)
    assert plan.workers == env.threads() == 3
    monkeypatch.setenv("HMC_THREADS", "5")
    assert plan.workers == env.threads() == 5
    options = plan.options.model_copy(update={"threads": 2})
    assert plan.model_copy(update={"options": options}).workers == 2


def test_a_slow_disk(tmp_path: Path) -> None:
    path = tmp_path / "shard"
    with pytest.raises(UsageError, match="No such file"):
        checkup.read_speed(path)
    path.touch()
    with pytest.raises(UsageError, match="nothing to read"):
        checkup.read_speed(path)
    with pytest.raises(UsageError, match="cannot be read"):
        checkup.read_speed(tmp_path)
    path.write_bytes(os.urandom(3 << 20))
    assert checkup.read_speed(path) > 0
    assert checkup.slow_disk(path, 6e8) == []
    (finding,) = checkup.slow_disk(path, 1e8, 600 * 10**9)
    assert "100 MB/s" in finding.found and "600.0 GB take 100 minutes" in finding.cost


def test_the_command_tells_them(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    found = [Finding("swap", "1.0 GB in use", "waits", "sudo swapoff -a")]
    monkeypatch.setattr("hmc.cli.doctor_command.checkup", lambda *_, **__: found)

    def run(*arguments: str) -> str:
        with pytest.raises(SystemExit) as ended:
            cli.main(["doctor", *arguments])
        assert ended.value.code == 0
        return capsys.readouterr().out

    assert "swap: 1.0 GB in use\n    costs: waits\n    mends: sudo swapoff -a\n" in run()
    path = tmp_path / "shard"
    path.write_bytes(b"x" * 4096)
    told = json.loads(run("--json", "--read-test", str(path)))
    assert told["findings"][0] == {
        "item": "swap",
        "found": "1.0 GB in use",
        "cost": "waits",
        "mend": "sudo swapoff -a",
    }
    assert "disk" in {row["item"] for row in told["rows"]}
    found.clear()
    assert "Nothing found that hurts." in run()
