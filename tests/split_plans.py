"""Small checkpoints compiled for GPUs of chosen sizes, so that some experts are on them and the
rest streams or stays on the host; needs no GPU, since a plan is only data.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest

from hmc.compiler import compile as compile_plan
from hmc.machine.detect import load_machine
from hmc.machine.model import Machine, Rate
from hmc.passes.place.budget import divide
from hmc.passes.records import Budget, Needs
from hmc.plan import Plan, Switch

STREAM, DUAL, BESIDE = "prefill.stream", "decode.dual", "prefill.beside"
CHOSEN = "prefill.stream.chosen"


@lru_cache
def machine(gpus: int, slow: bool = False) -> Machine:
    """This machine's CPU with GPUs and rates of a named machine; `slow`: so slow a CPU that the
    shortest prompts are better streamed, and so slow a link that every expert left out counts."""
    found, named = load_machine("auto"), load_machine("epyc9355-rtx5090x2")
    assert named.rates is not None
    rates = named.rates.model_copy(update={"read": named.rates.read[:1] * len(found.nodes)})
    installed = named.gpus * 2
    if slow:
        rates = rates.model_copy(update={"dot": _rate(1e6), "prefill": _rate(1e-9)})
        link = {"h2d": _rate(1e6)}
        installed = tuple(
            gpu.model_copy(update={"rates": gpu.rates.model_copy(update=link)})
            for gpu in installed
            if gpu.rates is not None
        )
    return found.model_copy(update={"name": "test", "gpus": installed[:gpus], "rates": rates})


def _rate(value: float) -> Rate:
    return Rate(value=value, kind="assumed", source="test")


def split_plan(
    directory: Path,
    *,
    gpus: int = 1,
    held: float = 0.5,
    beside: int = 1 << 28,
    switches: bool = False,
    slow: bool = False,
    **options: Any,
) -> Plan:
    """A plan with `held` of the routed experts on the GPUs, `beside` bytes of each for streaming;
    both decode phases are taken. With `switches`, prompts of 16 tokens stream, and two sequences
    are decoded in two lanes, whatever is predicted. With `slow`, prompts stream that are too
    short to choose all experts.
    """

    def budget(needs: Needs, *about: Any) -> Budget:
        found = divide(needs, *about)
        assert found is not None
        room = int(held * needs.experts / gpus)
        usable = [room + found.workspace + beside] * gpus
        usable[0] += found.dense + found.cache
        return replace(found, usable=tuple(usable), experts=(room,) * gpus)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("hmc.passes.place.budget.divide", budget)
        patched.setattr("hmc.passes.emit.dual_batch.WORTHWHILE", 0.0)
        settings = {"max_context": 256, "max_chunk": 64, "threads": 2, **options}
        plan = compile_plan(directory, machine=machine(gpus, slow), **settings)
    names = {phase.name for phase in plan.phases}
    if not switches or STREAM not in names:
        return plan
    points = [Switch(kind="prefill", phase=STREAM, tokens=16)]
    if DUAL in names:
        points.append(Switch(kind="decode", phase=DUAL, tokens=2))
    return plan.model_copy(update={"switches": tuple(points)})
