"""Facts about a plan that several subcommands print; pure functions of the plan."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, islice

from hmc.plan import ExpertPlane, Plan
from hmc.plan.verify import expand_runs
from hmc.ranges import expert_ranges


def placement_groups(plan: Plan) -> Iterator[tuple[str, dict[str, str]]]:
    """(layers, tiers) for runs of consecutive layers that are placed alike."""
    run: list[int] = []
    tiers: dict[str, str] = {}
    for placement in plan.placement:
        if run and (placement.tiers != tiers or placement.layer != run[-1] + 1):
            yield _span(run), tiers
            run = []
        tiers = placement.tiers
        run.append(placement.layer)
    if run:
        yield _span(run), tiers


def expert_place(plane: ExpertPlane, expert: int) -> tuple[int, int]:
    """(shard, offset) of one expert's tensor."""
    shard = next(islice(expand_runs(plane.shards), expert, None))
    offset = next(islice(accumulate(plane.offsets), expert, None))
    return shard, offset


def tier_of(plan: Plan, layer: int, expert: int) -> str:
    """The tier that holds an expert."""
    placement = next(each for each in plan.placement if each.layer == layer)
    return next(tier for tier, text in placement.tiers.items() if expert in expert_ranges(text))


def _span(layers: list[int]) -> str:
    return str(layers[0]) if len(layers) == 1 else f"{layers[0]}-{layers[-1]}"
