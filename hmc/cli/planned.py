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
from typing import Any

import click

from hmc import env
from hmc.checkpoint.location import is_gguf, model_name
from hmc.errors import CheckpointError, PlanError, PlanMismatchError, UsageError
from hmc.machine.detect import detect
from hmc.plan import Plan, load_plan, save_plan
from hmc.plan.model import SCHEMA_VERSION
from hmc.version import VERSION

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
    argument: str, checkpoint: str | None = None, *, dummy_weights: bool = False
) -> Planned:
    """The plan in the file `argument`, or of the model there: a directory or a GGUF file.

    A model is compiled for this machine and the plan kept in hmc's cache, by where the model is,
    the machine and the options. A plan that is there already is taken if it is still that of the
    checkpoint. What was done is said on stderr. `checkpoint` is where the user says that it is.
    """
    path = Path(argument)
    if path.is_dir() or (is_gguf(path) and path.exists()):
        return _kept(path.absolute(), checkpoint, {"dummy_weights": dummy_weights})
    return Planned(load_plan(path), argument, path.stem, checkpoint)


def _kept(location: Path, checkpoint: str | None, options: dict[str, Any]) -> Planned:
    """The plan of a model in the cache; compiled anew where there is none that holds."""
    if checkpoint is not None:
        raise UsageError(f"--checkpoint: {location} is a model itself; leave it out")
    name = model_name(location)
    path = env.cache_dir() / "plans" / f"{name}-{_key(location, options)}.hmp"
    if path.exists():
        try:
            plan = load_plan(path)
            _check(plan, location)
        except (PlanError, CheckpointError) as error:
            click.echo(f"[the plan of an earlier run does not hold: {error}]", err=True)
        else:
            click.echo(f"[plan of an earlier run: {path}]", err=True)
            return Planned(plan, str(path), name)
    from hmc.compiler import compile as compile_plan

    started = time.perf_counter()
    plan = compile_plan(location, **options)
    where = _keep(plan, path)
    seconds = time.perf_counter() - started
    click.echo(f"[compiled {location} in {seconds:.1f} s{where and f': {where}'}]", err=True)
    return Planned(plan, where, name)


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


def _key(location: Path, options: dict[str, Any]) -> str:
    """12 hex digits over all that a plan follows from, but for what is in the checkpoint."""
    machine = detect().model_dump(mode="json")
    settings = (env.isa_cap(), env.threads())
    parts = (str(location), machine, settings, options, VERSION, SCHEMA_VERSION, _source())
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:12]


@cache
def _source() -> list[tuple[str, int, int]]:
    """(file, modification time in ns, size) of every file of hmc's compiler and its rows."""
    home = Path(__file__).parents[1]
    folders = [home, *(home / name for name in ("passes", "codegen"))]
    files = sorted(path for each in folders for path in each.resolve().rglob("*.py"))
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in files]
