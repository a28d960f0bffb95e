"""The plan of a command's argument: of its file, or of a model, which is compiled into hmc's cache
unless there is a plan of an earlier time; hides how such plans are kept and when they are stale.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc import env
from hmc.checkpoint.location import is_gguf, model_name
from hmc.cli import hub
from hmc.cli.summary import memory, prediction
from hmc.errors import (
    CapacityError,
    CheckpointError,
    PlanError,
    PlanMismatchError,
    UsageError,
    VerifyError,
)
from hmc.hub.names import HubName
from hmc.machine.detect import detect
from hmc.plan import Plan, load_plan, save_plan
from hmc.plan.model import SCHEMA_VERSION
from hmc.version import VERSION

if TYPE_CHECKING:
    from hmc.hub.planning import HubPlan

PLAN = click.argument("plan_path", metavar="PLAN|MODEL")
"""What `planned` takes."""


@dataclass(frozen=True)
class Planned:
    """A plan, the file it lies in ("" where it could not be kept), what to call its model, and
    where the checkpoint is (None: where the plan says).
    """

    plan: Plan
    path: str
    name: str
    checkpoint: str | None = None


def planned(
    argument: str,
    checkpoint: str | None = None,
    *,
    dummy_weights: bool = False,
    fetch: bool = True,
) -> Planned:
    """The plan in the file `argument`, or of the model there: a directory, a GGUF file or a hub id.

    A model is compiled for this machine and the plan kept in hmc's cache, by where the model is,
    the machine and the options. A plan that is there already is taken if it is still that of the
    checkpoint. Weights at the hub are fetched, unless they are not wanted (`fetch`). What was done
    is said on stderr. `checkpoint` is where the user says that it is.

    Raises `HubError` for a plan of a hub id whose weights are wanted and have not been fetched.
    """
    path = Path(argument)
    if path.is_dir() or (is_gguf(path) and path.exists()):
        _refuse(checkpoint, argument)
        location = path.absolute()
        return _kept(model_name(location), location, {"dummy_weights": dummy_weights})
    if path.suffix == ".hmp" or (name := hub.hub_name(argument)) is None:
        plan = load_plan(path)
        if plan.checkpoint.hub and fetch and not (checkpoint or dummy_weights):
            checkpoint = hub.here(plan, argument)
        return Planned(plan, argument, path.stem, checkpoint)
    _refuse(checkpoint, argument)
    return _of_hub(name, {"dummy_weights": dummy_weights}, fetch)


def is_plan(argument: str) -> bool:
    """Whether an argument is the file of a plan; else it is a model, or nothing."""
    path = Path(argument)
    return path.suffix == ".hmp" or (
        path.is_file() and path.suffix != ".json" and not is_gguf(path)
    )


def compiled(model: str, *, fetch: bool = True, **options: Any) -> Plan:
    """The plan of a model with options of the command's own, which is not kept: of a directory, its
    config.json, a GGUF file or a hub id. Weights at the hub are fetched, unless they are not wanted
    (`fetch`) or the plan needs none.
    """
    if (name := hub.hub_name(model)) is not None:
        found = hub.compiled(hub.look_up(name), options)
        if fetch:
            _fetch(found, name)
        return found.plan
    from hmc.compiler import compile as compile_plan

    return compile_plan(model, **options)


def located(model: str, *, weights: bool) -> Path:
    """Where a model is on this machine: a path as it is; of a hub id what is fetched of it, without
    `weights` what describes it alone.
    """
    if (name := hub.hub_name(model)) is None:
        return Path(model)
    found = hub.whole(hub.look_up(name), weights=weights)
    if not hub.confirmed(found):
        raise click.Abort
    hub.fetch(found)
    return found.location


def _refuse(checkpoint: str | None, argument: str) -> None:
    if checkpoint is not None:
        raise UsageError(f"--checkpoint: {argument} is a model itself; leave it out")


def _of_hub(name: HubName, options: dict[str, Any], fetch: bool) -> Planned:
    """The plan of a model at the hub, in the cache as others are; its weights fetched."""
    listing = hub.look_up(name)
    path = _path(name.model, str(hub.place(listing, weights=not options["dummy_weights"])), options)
    plan = _load(path)
    if plan is None:
        started = time.perf_counter()
        found = hub.compiled(listing, options)
        where = _keep(found.plan, path)
        _say_compiled(str(found.name), started, where)
    else:
        found, where = hub.of_plan(plan, listing), str(path)
        click.echo(f"[plan of an earlier run: {path}]", err=True)
    if fetch:
        try:
            _fetch(found, name)
        except PlanMismatchError:
            path.unlink(missing_ok=True)  # the next run compiles what is there now
            raise
    return Planned(found.plan, where, found.name.model)


def _fetch(found: HubPlan, name: HubName) -> None:
    """The weights of a plan, once it was shown; `CapacityError` where they would not fit."""
    if found.plan.checkpoint.dummy:
        return
    if found.missing:
        for line in (*memory(found.plan), f"  {prediction(found.plan)}"):
            click.echo(line, err=True)
        if found.plan.too_large:
            raise CapacityError(
                f"{found.name}: this machine is too small for it: nothing was fetched;"
                f" `hmc show {name}` has the ledger"
            )
        if not hub.confirmed(found):
            raise click.Abort
    hub.fetch(found)


def _kept(name: str, location: Path, options: dict[str, Any]) -> Planned:
    """The plan of a model on this machine; compiled anew where the cache has none that holds."""
    path = _path(name, str(location), options)
    plan = _load(path, location)
    if plan is not None:
        click.echo(f"[plan of an earlier run: {path}]", err=True)
        return Planned(plan, str(path), name)
    from hmc.compiler import compile as compile_plan

    started = time.perf_counter()
    plan = compile_plan(location, **options)
    where = _keep(plan, path)
    _say_compiled(str(location), started, where)
    return Planned(plan, where, name)


def _say_compiled(what: str, started: float, where: str) -> None:
    seconds = time.perf_counter() - started
    click.echo(f"[compiled {what} in {seconds:.1f} s{where and f': {where}'}]", err=True)


def _path(name: str, location: str, options: dict[str, Any]) -> Path:
    return env.cache_dir() / "plans" / f"{name}-{_key(location, options)}.hmp"


def _load(path: Path, location: Path | None = None) -> Plan | None:
    """A plan of the cache; None, and said, where it is damaged or not that of the checkpoint."""
    if not path.exists():
        return None
    try:
        plan = load_plan(path)
        if location is not None:
            _check(plan, location)
    except (PlanError, CheckpointError, VerifyError) as error:
        click.echo(f"[the plan of an earlier run does not hold: {error}]", err=True)
        return None
    return plan


def _keep(plan: Plan, path: Path) -> str:
    """Where a plan was written; a cache that cannot be written costs a compilation each time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_plan(plan, path)
    except (OSError, PlanError) as error:
        click.echo(f"[plan not kept: {error} (HMC_CACHE names another folder)]", err=True)
        return ""
    return str(path)


def _check(plan: Plan, location: Path) -> None:
    """`PlanError` or `CheckpointError` where a plan is not, or no more, that of a checkpoint."""
    from hmc.checkpoint import load_config
    from hmc.runtime.weights.tensors import check_checkpoint

    if not plan.checkpoint.dummy:
        check_checkpoint(plan, location)
    elif load_config(location).sha256 != plan.checkpoint.config_sha256:
        raise PlanMismatchError(f"{location}: config.json has changed")


def _key(location: str, options: dict[str, Any]) -> str:
    """12 hex digits over all that a plan follows from, but for what is in the checkpoint."""
    machine = detect().model_dump(mode="json")
    settings = (env.isa_cap(), env.threads())
    parts = (location, machine, settings, options, VERSION, SCHEMA_VERSION, _source())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@cache
def _source() -> list[tuple[str, int, int]]:
    """(file, modification time in ns, size) of every file of hmc's compiler and its rows."""
    home = Path(__file__).parents[1]
    folders = [home, *(home / name for name in ("passes", "codegen"))]
    files = sorted(path for each in folders for path in each.resolve().rglob("*.py"))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
