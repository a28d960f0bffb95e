"""`hmc fetch`."""

from __future__ import annotations

import click

from hmc.cli import hub
from hmc.errors import UsageError
from hmc.hub.names import HubName
from hmc.plan import load_plan


@click.command("fetch")
@click.argument("plan_path", metavar="PLAN")
def command(plan_path: str) -> None:
    """Fetch the weights of a plan that was made from a hub id, as far as they are not on this
    machine: into the hub's cache (HF_HOME), finished where they were begun, and checked by hash.

    The hub's headers are compared with those that the plan was made for before anything is fetched.
    """
    plan = load_plan(plan_path)
    name = HubName.parse(plan.checkpoint.hub)
    if name is None:
        raise UsageError(f"{plan_path}: made from {plan.checkpoint.path}, not from a hub id")
    if plan.checkpoint.dummy:
        raise UsageError(f"{plan_path}: made without weights: it needs none")
    found = hub.of_plan(plan, hub.look_up(name))
    if found.missing:
        hub.check(found)
    hub.fetch(found)
    click.echo(f"{plan_path}: all files of {name} are in {found.location}")
