"""A small traced model of every family, and contexts to run passes in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.fx

from hmc import models
from hmc.checkpoint import Checkpoint
from hmc.machine import Machine, NumaNode
from hmc.passes import Context, Options
from hmc.passes.graph.trace import trace
from hmc.plan import ModelInfo

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
) -> Callable[..., tuple[torch.fx.GraphModule, Context]]:
    """`lowering(family, quant)`: a fresh traced graph and a context for it."""

    def make(
        family: str, quant: str = "fp8", **options: Any
    ) -> tuple[torch.fx.GraphModule, Context]:
        found = Checkpoint.open(checkpoint(family, quant))
        model = models.load(found.config)
        info = model.info
        context = Context(
            checkpoint=found,
            info=ModelInfo(architecture="test", **vars(info)),
            machine=MACHINE,
            isa="avx512_bf16",
            options=Options(**options),
        )
        return trace(model.module), context

    return make
