"""From a hub id to a plan, by headers alone; and from a plan back to the files that it needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hmc.checkpoint.jsonfile import first_few
from hmc.checkpoint.location import shard_paths
from hmc.compiler import compile as compile_plan
from hmc.errors import HubError
from hmc.hub import cache
from hmc.hub.fetch import Report, fetch, missing
from hmc.hub.headers import headers
from hmc.hub.listing import HubFile, Listing
from hmc.hub.names import HubName
from hmc.hub.wanted import wanted
from hmc.plan import Plan
from hmc.runtime.weights.tensors import check_checkpoint


@dataclass(frozen=True)
class HubModel:
    """Files of a model at the hub; `name` has its commit, and its file where that is GGUF."""

    name: HubName
    listing: Listing
    files: tuple[HubFile, ...]

    @property
    def location(self) -> Path:
        """Where the checkpoint is, or will be: a directory or a GGUF file in the hub's cache."""
        return location(self.name)

    @property
    def missing(self) -> tuple[HubFile, ...]:
        """Those of the files that are not there yet."""
        return missing(self.listing, self.files)

    def fetch(self, report: Report) -> None:
        """Fetch what is missing."""
        fetch(self.listing, self.files, report, "fetching")


@dataclass(frozen=True)
class HubPlan(HubModel):
    """A plan, and the files that it needs."""

    plan: Plan

    def fetch(self, report: Report) -> None:
        """Fetch what is missing; `PlanMismatchError` for what the plan was not made for."""
        super().fetch(report)
        if not self.plan.checkpoint.dummy:
            check_checkpoint(self.plan, self.location)


def location(name: HubName) -> Path:
    """Where a model is in the hub's cache; `name` has its commit, and its file if that is GGUF."""
    return cache.snapshot(name.repo, name.revision) / name.file


def place(listing: Listing, *, weights: bool) -> Path:
    """`location` of what a model is compiled from, found before that: also its GGUF file where none
    was named.
    """
    return location(replace(listing.pinned, file=wanted(listing, weights=weights).gguf))


def whole(listing: Listing, report: Report, *, weights: bool) -> HubModel:
    """All that hmc reads of a model, as its headers say; without `weights` what describes it."""
    wants = wanted(listing, weights=weights)
    fetch(listing, wants.small, report, "fetching config and tokenizer")
    with headers(listing, wants, report) as found:
        files = (*wants.small, *found.weights)
    return HubModel(replace(listing.pinned, file=wants.gguf), listing, files)


def compile_headers(listing: Listing, report: Report, **options: Any) -> HubPlan:
    """Compile a model (`hmc.compiler.compile`, with its options), whose weights are not fetched: no
    more of them than headers.
    """
    wants = wanted(listing, weights=not options.get("dummy_weights"))
    fetch(listing, wants.small, report, "fetching config and tokenizer")
    with headers(listing, wants, report) as found:
        plan = compile_plan(found.location, **options)
    name = replace(listing.pinned, file=wants.gguf)
    origin = {"path": str(location(name)), "hub": str(name)}
    checkpoint = plan.checkpoint.model_copy(update=origin)
    plan = plan.model_copy(update={"checkpoint": checkpoint})
    return HubPlan(name, listing, (*wants.small, *found.weights), plan)


def of_plan(plan: Plan, listing: Listing) -> HubPlan:
    """A plan of an earlier time, made at the same commit."""
    wants = wanted(listing, weights=not plan.checkpoint.dummy)
    shards = [shard.name for shard in plan.checkpoint.shards]
    names = [str(path) for path in shard_paths(Path(wants.gguf), shards)]
    if absent := [name for name in names if name not in listing.files]:
        raise HubError(f"{listing.name}: {first_few(absent)}: not there any more: compile it again")
    weights = tuple(listing.files[name] for name in names)
    name = HubName.parse(plan.checkpoint.hub) or listing.pinned
    return HubPlan(name, listing, (*wants.small, *weights), plan)


def check_headers(found: HubPlan, report: Report) -> None:
    """`PlanMismatchError` where the hub has other files than those that the plan was made for."""
    wants = wanted(found.listing)
    fetch(found.listing, wants.small, report, "fetching config and tokenizer")
    with headers(found.listing, wants, report) as there:
        check_checkpoint(found.plan, there.location)
