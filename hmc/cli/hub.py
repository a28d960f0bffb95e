"""Models of the hub on the command line: which arguments are such, compiled by their headers, and
fetched when that is wanted.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.checkpoint.location import is_gguf, shard_paths
from hmc.cli.output import progress, size
from hmc.errors import HubError, UsageError
from hmc.hub.names import HubName
from hmc.plan import Plan

if TYPE_CHECKING:
    from hmc.hub.listing import Listing
    from hmc.hub.planning import HubModel, HubPlan

FETCH = click.option(
    "--fetch/--no-fetch",
    default=None,
    help="Of a hub id: fetch the weights after the plan was shown, or not [default: fetch; on a"
    " terminal ask first; not those of a plan for another machine, or that this one is too small"
    " for].",
)


def hub_name(argument: str) -> HubName | None:
    """The hub id that an argument is; None for what is on this machine, which always wins.

    Raises `UsageError` for what is neither.
    """
    try:
        if Path(argument).exists():
            return None
    except (OSError, ValueError) as error:
        raise UsageError(f"{argument!r}: cannot be looked up: {error}") from None
    name = HubName.parse(argument)
    if name is None:
        raise UsageError(
            f"{argument!r}: no such directory or file, and no hub id, which is org/name,"
            " org/name@revision or org/name:file.gguf"
        )
    return name


def look_up(name: HubName) -> Listing:
    """What the hub has of a model; says so where it was not asked."""
    listing: Listing = _library("listing").look_up(name)
    if listing.unasked:
        where = f"{name.repo}@{listing.commit[:12]}"
        click.echo(f"[{listing.unasked}: taking what is on this machine of {where}]", err=True)
    return listing


def place(listing: Listing, *, weights: bool) -> Path:
    """Where the model is, or will be, in the hub's cache."""
    path: Path = _library("planning").place(listing, weights=weights)
    return path


def compiled(listing: Listing, options: dict[str, Any]) -> HubPlan:
    """The plan of a model, by its headers."""
    with progress() as report:
        found: HubPlan = _library("planning").compile_headers(listing, report, **options)
    return found


def whole(listing: Listing, *, weights: bool) -> HubModel:
    """The files of a model that hmc reads."""
    with progress() as report:
        found: HubModel = _library("planning").whole(listing, report, weights=weights)
    return found


def of_plan(plan: Plan, listing: Listing) -> HubPlan:
    """A plan that is there already."""
    found: HubPlan = _library("planning").of_plan(plan, listing)
    return found


def check(found: HubPlan) -> None:
    """`PlanMismatchError` where the hub has other files than those that a plan was made for."""
    with progress() as report:
        _library("planning").check_headers(found, report)


def here(plan: Plan, plan_path: str) -> str | None:
    """Where the weights of a plan are that was made from a hub id, if not where it says; `HubError`
    when they have not all been fetched.
    """
    absent = _absent(plan, Path(plan.checkpoint.path))
    if not absent:
        return None
    name = HubName.parse(plan.checkpoint.hub)
    if name is not None and importlib.util.find_spec("huggingface_hub") is not None:
        there = _library("cache").snapshot(name.repo, name.revision) / name.file
        if not _absent(plan, there):
            return str(there)
    count, of = len(absent), len(plan.checkpoint.shards)
    raise HubError(
        f"{plan_path}: {count} of {of} files of {plan.checkpoint.hub} are not on this machine yet:"
        f" `hmc fetch {plan_path}`"
    )


def _absent(plan: Plan, location: Path) -> list[Path]:
    shards = [shard.name for shard in plan.checkpoint.shards]
    beside = [] if is_gguf(location) else [location / "config.json"]
    return [path for path in (*shard_paths(location, shards), *beside) if not path.exists()]


def to_fetch(found: HubModel) -> int:
    """Bytes that are still to come."""
    total: int = _library("fetch").left(found.listing, found.missing)
    return total


def confirmed(found: HubModel) -> bool:
    """Whether whoever sits at the terminal wants the files; True where nobody does."""
    total = to_fetch(found)
    if not total or not (sys.stdin.isatty() and sys.stderr.isatty()):
        return True
    return click.confirm(f"Fetch {size(total)} of {found.listing.name}?", default=True, err=True)


def fetch(found: HubModel) -> None:
    """Fetch what is missing, with a progress bar; says what, where to, and how long it took."""
    absent = found.missing
    if not absent:
        found.fetch(lambda *_: None)
        return
    total = to_fetch(found)
    files = f"{len(absent)} file{'s' if len(absent) > 1 else ''}"
    click.echo(
        f"[fetching {files} of {found.listing.name}, {size(total)}, into {found.location}]",
        err=True,
    )
    started = time.perf_counter()
    with progress(transfer=True) as report:
        found.fetch(report)
    seconds = time.perf_counter() - started
    click.echo(f"[fetched {size(total)} in {seconds:.1f} s, hashes checked]", err=True)


def _library(module: str) -> Any:
    """A module of hmc.hub, which needs a package that hmc alone does not bring."""
    try:
        return importlib.import_module(f"hmc.hub.{module}")
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "hmc":
            raise
        raise UsageError(
            f"hub ids need the package {error.name}: pip install 'hmc[hub]'"
        ) from error
