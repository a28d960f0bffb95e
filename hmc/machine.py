"""The machine a plan is made for, as data: cores, NUMA nodes, ISA flags, memory.

Only lasting facts are kept (totals, not what is free now), so that compiling twice gives the same
plan. Filled by `hmc.detect` or from a JSON file.
"""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict


class NumaNode(BaseModel):
    """One NUMA node: its logical CPUs and its memory in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    id: int
    cpus: tuple[int, ...]
    memory_bytes: int


class Gpu(BaseModel):
    """One GPU: name and memory in bytes."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    memory_bytes: int


class Machine(BaseModel):
    """A machine's fingerprint. `memory_bytes` is what the process may use: RAM, or less under a
    cgroup limit.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    cpu: str
    flags: tuple[str, ...]
    cores: int
    nodes: tuple[NumaNode, ...]
    llc_bytes: int
    memory_bytes: int
    gpus: tuple[Gpu, ...] = ()
