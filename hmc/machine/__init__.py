"""A machine as data, and this one as /proc and /sys describe it.

model.py     the records: cores, nodes, GPUs, rates
detect.py    this machine, or one of a file
topology.py  cores, siblings and NUMA nodes of the process's CPUs
here.py      the saved rates of this machine
"""

from hmc.machine.model import (
    CpuRates,
    Frozen,
    GemvRate,
    Gpu,
    GpuRates,
    Machine,
    NumaNode,
    Rate,
    RateKind,
)

__all__ = [
    "CpuRates",
    "Frozen",
    "GemvRate",
    "Gpu",
    "GpuRates",
    "Machine",
    "NumaNode",
    "Rate",
    "RateKind",
]
