"""Measures what this machine reaches and writes it down as a `Machine` with rates.

Every rate is the median of several passes over more memory than the caches hold, through the very
kernels that plans run; least and most are kept, and half of their distance over the median is the
rate's spread. What the cost model has no place for (reads by fewer threads, the register-only peak)
is reported beside the machine.

    cpu.py     streaming reads, matmuls, attention, barriers
    gpu.py     copies, memory, matmuls, launches, where PyTorch finds a GPU
    result.py  measurements, and how much is measured
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from hmc.bench.compare import Report, silent
from hmc.bench.probe import cpu
from hmc.bench.probe.gpu import probe_gpus
from hmc.bench.probe.result import FULL, QUICK, Effort, Measurement
from hmc.codegen.isa import best_isa
from hmc.errors import PlanError
from hmc.files import write_file
from hmc.machine.detect import detect
from hmc.machine.model import Machine
from hmc.machine.topology import this_machine

__all__ = ["FORMATS", "FULL", "QUICK", "Effort", "Measurement", "Probe", "probe", "save"]

FORMATS = ("fp8", "bf16", "int4")


@dataclass(frozen=True)
class Probe:
    """The machine with its rates, and all that was measured."""

    machine: Machine
    measurements: tuple[Measurement, ...]


def probe(
    effort: Effort = FULL,
    *,
    formats: Sequence[str] = FORMATS,
    threads: int | None = None,
    report: Report = silent,
) -> Probe:
    """Measure this machine with `threads` native workers (default: all); GPUs where PyTorch finds
    some. Raises `MachineError` for lack of an ISA, `CapacityError` for lack of memory.
    """
    isa = best_isa()
    nodes = this_machine().nodes
    stages = len(nodes) + 4
    found: list[Measurement] = []
    for number, node in enumerate(nodes):
        report(f"probe: streaming reads of node {node.id}", number, stages)
        found += cpu.reads(node, isa, effort)
    if len(nodes) > 1:
        found.append(cpu.remote(nodes, isa, effort))
    report("probe: matmuls", stages - 4, stages)
    rows = cpu.kernels(isa, effort, formats, threads)
    found += cpu.matmuls(rows)
    if len(nodes) == 1:  # its reads are those of all cores, seen all along
        found[0] = replace(found[0], values=found[0].values + cpu.shared_reads(rows))
    report("probe: peak and barriers", stages - 3, stages)
    found += cpu.pool_rates(isa, effort, threads)
    report("probe: attention", stages - 2, stages)
    found += cpu.attention(effort, threads)
    report("probe: GPUs", stages - 1, stages)
    gpus, more = probe_gpus(effort)
    report("probe: GPUs", stages, stages)
    rates = cpu.cpu_rates([*found, *more], rows)
    machine = detect().model_copy(update={"rates": rates, "gpus": gpus})
    return Probe(machine, (*found, *more))


def save(machine: Machine, path: str | os.PathLike[str]) -> None:
    """Write a machine file, whole or not at all; `PlanError` when it cannot be written."""
    text = machine.model_dump_json(indent=1, exclude_none=True) + "\n"
    write_file(path, text, "the machine", PlanError)
