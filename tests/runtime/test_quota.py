"""Limits of control groups, in groups that the test makes (named skip where it may not), and in
trees of files."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

import hmc
from hmc import cgroup
from hmc.errors import CapacityError
from hmc.plan import Plan
from hmc.runtime.executor import check_memory

MODEL = Path(__file__).parents[2] / "examples/configs/qwen3-30b-a3b-fp8"
PAGE = 1 << 20
TOLD = "from hmc import cgroup, env; m = cgroup.memory(); print(env.threads(), m.limit if m else 0)"

Told = Callable[[str, dict[str, str]], tuple[int, int]]


def _group(controller: str, file: str) -> Path:
    """A new group below this process's own in which `file` limits; skips where none can be made."""
    folder = next(cgroup.groups(controller))
    group = folder / f"hmc-test-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made in {folder}: {error.strerror}")
    if not (group / file).exists():
        group.rmdir()
        pytest.skip(f"groups in {folder} have no {file}")
    return group


@pytest.fixture
def told() -> Iterator[Told]:
    """(threads, memory limit) that a process says it has in a group of a controller of v1 or ("")
    v2, with these files written."""
    groups: list[Path] = []

    def ask(controller: str, files: dict[str, str]) -> tuple[int, int]:
        group = _group(controller, next(iter(files)))
        groups.append(group)
        for name, text in files.items():
            (group / name).write_text(text)
        joined = f'echo $$ > {group}/cgroup.procs && exec "$0" -c "$1"'
        bare = {name: value for name, value in os.environ.items() if name != "HMC_THREADS"}
        out = subprocess.run(
            ["sh", "-c", joined, sys.executable, TOLD],
            env=bare, capture_output=True, text=True, timeout=60, check=True,
        ).stdout  # fmt: skip
        threads, limit = map(int, out.split())
        return threads, limit

    yield ask
    for group in groups:
        group.rmdir()


QUOTAS = {
    "v1": ("cpu", lambda share: {"cpu.cfs_quota_us": str(share), "cpu.cfs_period_us": "100000"}),
    "v2": ("", lambda share: {"cpu.max": f"{share} 100000"}),
}
LIMITS = {"v1": ("memory", "memory.limit_in_bytes"), "v2": ("", "memory.max")}


@pytest.mark.parametrize("version", QUOTAS)
def test_one_cpus_time_is_one_thread(told: Told, version: str) -> None:
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("one CPU is one thread anyway")
    controller, files = QUOTAS[version]
    assert told(controller, files(100_000))[0] == 1


@pytest.mark.parametrize("version", LIMITS)
def test_a_memory_limit_is_seen(told: Told, version: str) -> None:
    controller, file = LIMITS[version]
    assert told(controller, {file: str(300 << 20)})[1] == 300 << 20


@pytest.fixture(scope="module")
def plan() -> Plan:
    return hmc.compile(MODEL, dummy_weights=True, layers=1, max_context=256)


@pytest.mark.parametrize("file", ["memory.max", "memory.high"])
def test_just_above_and_just_below_what_a_plan_needs(
    plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str
) -> None:
    """A group whose memory is full of page cache that was read more than once."""
    memory = cgroup.memory
    monkeypatch.setattr(cgroup, "memory", lambda: memory(tmp_path))
    room = SimpleNamespace(available=1 << 40, total=1 << 40)
    monkeypatch.setattr("psutil.virtual_memory", lambda: room)
    group, anonymous = tmp_path / "sys/fs/cgroup/box", 5 * PAGE
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    needed = plan.ledger_totals["host"] + anonymous

    def check(limit: int) -> None:
        (group / file).write_text(f"{limit}\n")
        (group / "memory.current").write_text(f"{limit}\n")
        (group / "memory.stat").write_text(
            f"anon {anonymous}\ninactive_file {PAGE}\nactive_file {limit - anonymous - PAGE}\n"
        )
        check_memory(plan, own_weights=True)

    check(needed + PAGE)
    with pytest.raises(CapacityError, match="are free"):
        check(needed - PAGE)
