"""A small traced model of every family, and targets to run passes for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.fx

from hmc import models
from hmc.checkpoint import Checkpoint
from hmc.machine import Machine, NumaNode
from hmc.passes.graph.trace import trace
from hmc.passes.records import Target

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


@pytest.fixture
def lowering(
    checkpoint: Callable[..., Path],
) -> Callable[..., tuple[torch.fx.GraphModule, Target]]:
    """`lowering(family, quant)`: a fresh traced graph and a target for it."""

    def make(family: str, quant: str = "fp8") -> tuple[torch.fx.GraphModule, Target]:
        found = Checkpoint.open(checkpoint(family, quant))
        model = models.load(found.config)
        target = Target(
            checkpoint=found,
            info=model.info,
            machine=MACHINE,
            isa="avx512_bf16",
        )
        return trace(model.module), target

    return make
