"""A machine of four cores that has every kernel tier, and no rates."""

from __future__ import annotations

from hmc.machine.model import Machine, NumaNode

MACHINE = Machine(
    name="test",
    cpu="test",
    flags=(
        *("avx2", "fma", "f16c", "bmi1", "bmi2", "popcnt", "avx512f", "avx512bw", "avx512dq"),
        *("avx512vl", "avx512cd", "avx512_bf16", "avx512vbmi"),
    ),
    cores=4,
    nodes=(NumaNode(id=0, cpus=(0, 1, 2, 3), memory_bytes=1 << 34),),
    llc_bytes=1 << 25,
    memory_bytes=1 << 34,
)
