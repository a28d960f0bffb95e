"""A plan's schedules made anew for another placement or ring. They follow from both, so the passes
run again on the plan's own checkpoint and machine, with the placement given instead of solved;
hides that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch.fx

from hmc import models
from hmc.checkpoint import Checkpoint
from hmc.errors import CapacityError, PlanMismatchError
from hmc.passes import PIPELINE, Context, Options, run_pipeline
from hmc.passes.graph.trace import trace
from hmc.passes.place.expert_placement import ExpertPlacement
from hmc.passes.place.nodes import routed_nodes
from hmc.plan import LayerPlacement, Plan
from hmc.plan.verify import expert_ranges


def replan(
    plan: Plan, placement: Sequence[LayerPlacement], checkpoint: str = "", *, ring: int = 0
) -> Plan:
    """The plan with another placement, and schedules, ledger and switch-over points to match; tile
    choices stay. `ring` experts fit into the slots of a streamed prefill (0: as many as were asked
    for by hand before, else as many as pay). `checkpoint` is where the model is if not where the
    plan says.

    Raises `CapacityError` when a GPU cannot hold what is placed there, `PlanMismatchError` for
    another checkpoint.
    """
    source = checkpoint or plan.checkpoint.path
    dummy = plan.checkpoint.dummy
    found = Checkpoint.from_config(source) if dummy else Checkpoint.open(source)
    if found.config.sha256 != plan.checkpoint.config_sha256:
        raise PlanMismatchError(f"{source}: its config.json is not the one the plan was made for")
    values = {**found.config.values, "num_hidden_layers": plan.model.layers}
    found = replace(found, config=replace(found.config, values=values))
    block = plan.kv.block
    spare = block * (plan.limits.max_batch - 1)
    per_sequence = -(-plan.limits.max_context // block) * block
    context = Context(
        checkpoint=found,
        info=plan.model,
        machine=plan.machine,
        isa=plan.isa,
        options=Options(
            max_context=plan.limits.max_context,
            max_chunk=plan.limits.max_chunk,
            max_batch=plan.limits.max_batch,
            threads=plan.threads,
            kv_block=block,
            concurrency=max(1, (plan.kv.capacity_tokens - spare) // per_sequence),
            ring=ring or _ring_set(plan),
        ),
    )
    given = _Given(tuple(placement))
    pipeline = tuple(given if isinstance(each, ExpertPlacement) else each for each in PIPELINE)
    run_pipeline(pipeline, trace(models.load(found.config).module), context)
    assert context.plan is not None
    return _with_choices(plan, context.plan)


def _ring_set(plan: Plan) -> int:
    """The ring that was set or kept last, 0 if none was."""
    rings = [
        int(each.subject.removeprefix("ring="))
        for each in plan.decisions
        if each.by == "tune" and each.subject.startswith("ring=") and each.choice != "not kept"
    ]
    return rings[-1] if rings else 0


@dataclass(frozen=True)
class _Given(ExpertPlacement):
    """Stands in for the pass that solves the placement: checks the given one and takes it."""

    placement: tuple[LayerPlacement, ...] = ()

    name: ClassVar[str] = "expert_placement"

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        before = len(context.decisions)
        super().run(graph, context)
        del context.decisions[before:]  # they speak of another placement
        sizes = _expert_bytes(graph, context)
        held: Counter[str] = Counter()
        for placement in self.placement:
            for tier, text in placement.tiers.items():
                held[tier] += sizes[placement.layer] * len(expert_ranges(text))
        on_gpus = {tier: size for tier, size in held.items() if tier != "host"}
        if on_gpus and context.budget is None:
            raise CapacityError(
                f"the plan uses no GPU of {context.machine.name}: its rates are not known, or the"
                " dense part does not fit; nothing can be pinned there"
            )
        for tier, size in on_gpus.items():
            assert context.budget is not None
            room = context.budget.experts[int(tier.removeprefix("gpu"))]
            if size > room:
                raise CapacityError(
                    f"{size / 1e9:.1f} GB of experts are pinned to {tier}, which has room for"
                    f" {room / 1e9:.1f} GB beside dense weights, cache and activations: pin fewer"
                )
        context.placement = self.placement


def _expert_bytes(graph: torch.fx.GraphModule, context: Context) -> dict[int, int]:
    """Stored bytes of one expert by layer."""
    sizes: dict[int, int] = {}
    for found in routed_nodes(graph):
        columns = [context.source(weight)[0] for weight in found.weights]
        sizes[found.layer] = sum(
            column.data.nbytes + (column.scale.nbytes if column.scale else 0) for column in columns
        )
    return sizes


def _with_choices(old: Plan, new: Plan) -> Plan:
    """The new plan with what the old one had chosen beside placement: tiles, goals, decisions."""
    kernels = {
        key: kernel.model_copy(update={"tile": old.kernels[key].tile})
        if key in old.kernels
        else kernel
        for key, kernel in new.kernels.items()
    }
    kept = tuple(d for d in old.decisions if d.by in ("expert_placement", "tune"))
    return new.model_copy(
        update={
            "kernels": kernels,
            "goals": old.goals,
            "lossy": old.lossy,
            "checkpoint": old.checkpoint,
            "decisions": (*new.decisions, *kept),
        }
    )
