"""A small traced model of every family, and targets to run passes for."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch.fx
from plain_machine import MACHINE

from hmc import models
from hmc.checkpoint import Checkpoint
from hmc.passes.graph.trace import trace
from hmc.passes.records import Target


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
