"""Reads this machine, or a machine file, into a `Machine`, and finds the rates that are true here;
and what memory is free now. Hides /proc, /sys, and where profiles are.
"""

from __future__ import annotations

import os
import platform
import re
from pathlib import Path
from typing import Literal

import psutil
from pydantic import ValidationError

from hmc import cgroup
from hmc.codegen.isa import cpu_flags
from hmc.env import config_dir, usable_cpus
from hmc.errors import MachineError, UsageError
from hmc.files import integer, text_of
from hmc.machine.model import Machine, NumaNode
from hmc.machine.topology import SYS, Topology, memory_of, this_machine

KERNEL_FLAGS = (
    "avx2 fma f16c bmi1 bmi2 popcnt avx512f avx512bw avx512dq avx512vl avx512cd avx512_bf16"
    " avx512vbmi avx512_vnni gfni amx_tile amx_bf16"
).split()
"""CPU flags that any kernel tier, present or planned, may ask for; as /proc/cpuinfo spells them."""


_NAMED = Path(__file__).parents[1] / "machines"


def detect() -> Machine:
    """This machine, as the current process sees it (affinity mask, cgroup limits)."""
    flags = cpu_flags()
    topology = this_machine()
    memory = memory_limit()
    return Machine(
        name=platform.node() or "this machine",
        cpu=_cpu_name(),
        flags=tuple(flag for flag in KERNEL_FLAGS if flag in flags),
        cores=usable_cpus(),
        nodes=numa_nodes(topology, memory),
        llc_bytes=max((cache.bytes for cache in topology.caches), default=0),
        memory_bytes=memory,
    )


def load_machine(name: str) -> Machine:
    """`auto` for this machine, a named machine, else a JSON file; `UsageError` or `MachineError`
    when it cannot be read.

    This machine's GPUs and rates are not detected: a probe measures them into a machine file.
    """
    if name == "auto":
        return detect()
    named = _NAMED / f"{name}.json"
    path = named if name in named_machines() else Path(name)
    try:
        text = path.read_text()
    except OSError as error:
        raise UsageError(
            f"--machine {name}: {error.strerror}; give `auto`, a machine file or one of"
            f" {', '.join(named_machines())}"
        ) from error
    try:
        return Machine.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise MachineError(f"machine file {name}: {where}: {first['msg']}") from error


def named_machines() -> tuple[str, ...]:
    """Names of the machines that come with hmc."""
    return tuple(sorted(path.stem for path in _NAMED.glob("*.json")))


def available_bytes() -> int:
    """Memory that can be taken now without swapping: free and reclaimable RAM, no more than the
    cgroup leaves.
    """
    free = int(psutil.virtual_memory().available)
    allowed = cgroup.memory()
    return free if allowed is None else min(free, allowed.left)


def node_free_bytes(node: int) -> int:
    """Memory of a NUMA node that can be taken now, but for what the kernel keeps: free, or page
    cache. All that can be taken where /sys does not tell."""
    text = text_of(SYS / f"node/node{node}/meminfo")
    found = {name: 1024 * int(size) for name, size in re.findall(r"(\S+):\s+(\d+) kB", text)}
    if "MemFree" not in found:
        return available_bytes()
    names = ("MemFree", "Active(file)", "Inactive(file)")
    return max(0, sum(found.get(name, 0) for name in names) - found["MemTotal"] // 64)


def memory_limit() -> int:
    """Total RAM in bytes, or the cgroup's limit where that is lower."""
    total = int(psutil.virtual_memory().total)
    allowed = cgroup.memory()
    return total if allowed is None else min(total, allowed.limit)


def huge_by_advice(setting: Literal["enabled", "shmem_enabled"]) -> bool:
    """Whether the kernel gives transparent huge pages to memory that asks for them: private memory
    ("enabled") or memory files ("shmem_enabled").
    """
    text = text_of(Path("/sys/kernel/mm/transparent_hugepage") / setting)
    return any(f"[{word}]" in text for word in ("always", "within_size", "advise", "madvise"))


def free_huge_pages() -> int:
    """Pages of 2 MiB that were reserved by the administrator and nobody uses or will use."""
    folder = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")
    free = integer(folder / "free_hugepages") or 0
    return max(0, free - (integer(folder / "resv_hugepages") or 0))


def _cpu_name() -> str:
    text = text_of(Path("/proc/cpuinfo"))
    found = re.search(r"^model name\s*: (.*)$", text, re.M)
    return found[1] if found else "unknown" if text else platform.processor() or "unknown"


def numa_nodes(topology: Topology, memory: int, root: Path = SYS) -> tuple[NumaNode, ...]:
    """The nodes of a topology with their memory: all of `memory` where `root` tells nothing."""
    sizes = {node.id: memory_of(root / f"node/node{node.id}") for node in topology.nodes}
    return tuple(
        NumaNode(
            id=node.id,
            cpus=node.cpus,
            memory_bytes=memory if (size := sizes[node.id]) is None else size,
            cores=len(node.cores) if len(node.cores) < len(node.cpus) else 0,
            memory=None if node.memory == node.id else node.memory,
        )
        for node in topology.nodes
    )


def profile_path() -> Path:
    """The saved profile of this machine; there may be none."""
    return config_dir() / "machine.json"


def machine_here(planned: Machine, name: str | None = None) -> Machine | None:
    """A machine with CPU rates that are true here: the one named, else `planned` (a plan's), else
    the saved profile; None where neither has rates, or both are of another machine.

    Raises `UsageError` or `MachineError` for a machine that was named and has no rates.
    """
    if name is not None:
        return rated_machine(name)
    path = profile_path()
    if planned.rates is None and not os.path.exists(path):
        return None
    here = detect()
    if planned.rates is not None and _same(planned, here):
        return planned
    if os.path.exists(path):  # not where its folder may not be read
        machine = load_machine(str(path))
        if machine.rates is not None and _same(machine, here):
            return machine
    return None


def rated_machine(name: str) -> Machine:
    """`load_machine`; `MachineError` for one without rates."""
    machine = load_machine(name)
    if machine.rates is None:
        raise MachineError(f"machine {name} declares no rates: `hmc probe` measures them")
    return machine


def how_to() -> str:
    """What to do where there is none."""
    return "no prediction: run `hmc probe` once, when nothing else runs"


def _same(machine: Machine, here: Machine) -> bool:
    return (machine.cpu, machine.cores) == (here.cpu, here.cores)
