"""One field of a plan changed at random: `verify_plan` refuses it, or nothing that a native kernel
reads or writes changes (tests/footprint.py).

What a kernel is given and what is no part of the footprint, since it moves no address, and has no
second copy in a plan that could contradict it:

    eps, scale, factor      of all phases alike (`ARGS` of kind f32); of one phase alone: refused
    constants               inverse frequencies: their number counts, not their values
    act                     every kernel has the same one
    tile                    which of several loops computes the same: any that emitters take
    format of a bias        PyTorch makes the f32 copy that kernels read
    weight_bytes, flops     in how many pieces workers share a record
    max_tokens, max_context rows and scratch are sized by them, and calls are held to them
    capacity of the cache   the runtime numbers the pages that it has
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
from footprint import footprint
from mutations import Mutator
from split_plans import split_plan

from hmc.compiler import compile as compile_plan
from hmc.errors import VerifyError
from hmc.plan import Plan
from hmc.plan.verify import verify_plan

PLANS: dict[str, Callable[[Path], Plan]] = {
    "host": lambda path: compile_plan(path, max_context=256, max_chunk=64, threads=2),
    "hybrid": lambda path: split_plan(path, beside=0),
    "streamed": lambda path: split_plan(path, switches=True, slow=True),
    "ranks": lambda path: split_plan(path, gpus=2, switches=True),
}
FAMILIES = {"deepseek_v3": "fp8", "qwen3_moe": "int4", "mixtral": "bf16"}


@pytest.fixture(scope="module")
def planned(checkpoint: Callable[..., Path]) -> Callable[[str, str], Plan]:
    return lru_cache(
        lambda family, kind: PLANS[kind](checkpoint(family, FAMILIES[family], layers=2))
    )


@pytest.mark.parametrize("kind", PLANS)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "seeds", [range(60), pytest.param(range(60, 3000), marks=pytest.mark.slow)], ids=str
)
def test_a_field_changed_is_refused_or_changes_nothing(
    family: str, kind: str, seeds: range, planned: Callable[[str, str], Plan]
) -> None:
    plan = planned(family, kind)
    verify_plan(plan)
    mutator, before = Mutator(plan), footprint(plan)
    refused = 0
    for seed in seeds:
        found = mutator.mutation(seed)
        try:
            verify_plan(found.plan)
        except VerifyError:
            refused += 1
            continue
        where = ".".join(map(str, found.path))
        assert footprint(found.plan) == before, f"{where}: {found.old} -> {found.new} (seed {seed})"
    assert refused > len(seeds) // 3


def test_the_footprint_sees_what_a_kernel_is_given(planned: Callable[[str, str], Plan]) -> None:
    """Were nothing refused, these changes would show."""
    plan = planned("mixtral", "host")
    before = footprint(plan)

    def changed(op: str, **update: Any) -> Plan:
        first, *others = plan.phases
        at = next(at for at, step in enumerate(first.steps) if step.op == op)
        steps = list(first.steps)
        steps[at] = steps[at].model_copy(update=update)
        return plan.model_copy(
            update={"phases": (first.model_copy(update={"steps": tuple(steps)}), *others)}
        )

    linear = next(step for step in plan.phases[0].steps if step.op == "linear")
    for update in (
        {"attrs": {**linear.attrs, "n": 8}},
        {"weights": {"weight": plan.weights[0].name}},
        {"inputs": {"x": linear.inputs["x"].model_copy(update={"column": 8, "width": 8})}},
    ):
        assert footprint(changed("linear", **update)) != before
    plane = plan.weights[0].planes[0]
    plane = plane.model_copy(update={"offset": plane.offset + 2})
    moved = plan.weights[0].model_copy(update={"planes": (plane, *plan.weights[0].planes[1:])})
    assert footprint(plan.model_copy(update={"weights": (moved, *plan.weights[1:])})) != before
