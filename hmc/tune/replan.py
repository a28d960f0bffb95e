"""A plan's schedules made anew for another placement or other options: the passes run again on the
plan's own checkpoint, machine and options. Hides what of a plan they do not make.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hmc import env
from hmc.compiler import begin, open_checkpoint
from hmc.errors import PlanMismatchError
from hmc.passes import PLAN
from hmc.passes.manager import configured, run_plan
from hmc.passes.place.expert_placement import ExpertPlacement
from hmc.plan import LayerPlacement, Plan


def replan(
    plan: Plan, placement: Sequence[LayerPlacement], checkpoint: str = "", **changes: int
) -> Plan:
    """The plan with a placement and `changes` of its options, and schedules, ledger and switch-over
    points to match; tile choices stay. `checkpoint` is where the model is if not where the plan
    says.

    Raises `CapacityError` when a GPU cannot hold what is placed there, `PlanMismatchError` for
    another checkpoint.
    """
    options = plan.options.model_copy(update=changes)
    source = checkpoint or plan.checkpoint.path
    found = open_checkpoint(source, options)
    if found.config.sha256 != plan.checkpoint.config_sha256:
        raise PlanMismatchError(f"{source}: its config.json is not the one the plan was made for")
    given = tuple(placement)
    passes = tuple(
        replace(each, given=given) if isinstance(each, ExpertPlacement) else each
        for each in configured(PLAN, options)
    )
    with env.uncollected():
        return _with_choices(plan, run_plan(passes, begin(found, plan.machine, options)))


def _with_choices(old: Plan, new: Plan) -> Plan:
    """The new plan with what no pass chose: tiles, and why experts are where they are."""
    kernels = {
        key: replace(kernel, tile=old.kernels[key].tile) if key in old.kernels else kernel
        for key, kernel in new.kernels.items()
    }
    kept = tuple(each for each in old.decisions if each.by in (ExpertPlacement.name, "tune"))
    return new.model_copy(
        update={
            "kernels": kernels,
            "checkpoint": old.checkpoint,
            "decisions": (*new.decisions, *kept),
        }
    )
