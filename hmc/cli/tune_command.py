"""`hmc tune`: change a plan by hand or by search, and write what was tried into it."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from hmc.cli.arguments import CHECKPOINT, DEVICES, REPETITIONS, count, option, output, positive
from hmc.cli.output import JSON, console, print_json, progress, table
from hmc.cli.planned import PLAN, planned
from hmc.errors import UsageError
from hmc.plan import Plan, save_plan

if TYPE_CHECKING:
    from hmc.tune.trials import Found


@click.command("tune")
@PLAN
@output("plan (.hmp)")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="threads=32, chunk=1024, ring=64 (experts), or a tile choice of an op's kernels:"
    " linear.prefetch=4096.",
)
@click.option(
    "--pin",
    "pins",
    multiple=True,
    metavar="EXPERTS=TIER",
    help="layers.3-10.experts.0-31=gpu0: these experts on this device.",
)
@click.option(
    "--search", "searching", is_flag=True, help="Search too, after --set and --pin were applied."
)
@CHECKPOINT
@option("--dummy-weights", is_flag=True, help="Search with random weights.")
@positive("--prompt", default=1024, help="Tokens of a prefill.")
@count("--context", default=128, help="Tokens before those decoded.")
@positive("--tokens", default=16, help="Tokens to decode.")
@REPETITIONS
@DEVICES
@JSON
def command(
    plan_path: str,
    output: str,
    settings: tuple[str, ...],
    pins: tuple[str, ...],
    searching: bool,
    checkpoint: str | None,
    dummy_weights: bool,
    repetitions: int,
    as_json: bool,
    **loads: Any,
) -> None:
    """Change a plan, or that of a model, compiled for this machine, by hand (--set, --pin), or
    without these by search on this machine.

    The search tries threads, prefetch and row blocks of the decode kernels, chunk size and token
    tiles of prefill, and with GPUs the ring of a prompt that streams (--prompt says how long a
    one), one after the other. A change is kept when it is measured at least 3 % better in turns
    with the plan it changes, twice, and greedy output is the same. What was tried, measured and
    kept ends in the plan's decisions (`hmc show`), the result's rates beside it.

    \b
    hmc tune plan.hmp -o tuned.hmp
    hmc tune plan.hmp -o tuned.hmp --set threads=32 --set linear.prefetch=4096
    hmc tune plan.hmp -o tuned.hmp --pin 'layers.3-10.experts.0-31=gpu0'
    """
    taken = planned(plan_path, checkpoint, dummy_weights=dummy_weights)
    plan = taken.plan
    from hmc.predict import measured as store
    from hmc.tune.measure import Runner
    from hmc.tune.pins import parse_pin, place
    from hmc.tune.settings import apply, current, decided, parse_setting
    from hmc.tune.trials import search

    before, source = len(plan.decisions), taken.checkpoint or ""
    if pins:
        parsed = [parse_pin(text) for text in pins]
        plan = place(plan, parsed, source)
        before = len(plan.decisions)
        for text in pins:
            plan = decided(plan, "experts", f"pinned {text}", "asked for by hand")
    wanted = tuple(map(parse_setting, settings))
    was = [current(plan, each) for each in wanted]
    plan = apply(plan, wanted, source)
    for each, old in zip(wanted, was, strict=True):
        reason = f"asked for by hand; was {'the default' if old is None else old}"
        plan = decided(plan, str(each), "set", reason)
    found = None
    if searching or not (pins or settings):
        if plan.checkpoint.dummy and not dummy_weights:
            raise UsageError("the plan was made without weights: search it with --dummy-weights")

        def make(candidate: Plan) -> Runner:
            return Runner(candidate, source, dummy_weights=dummy_weights, **loads)

        with progress() as report:
            found = search(plan, make, repetitions=repetitions, report=report, checkpoint=source)
        plan = found.plan
    save_plan(plan, output)
    if found is not None:
        store.record(output, plan, found.measured)
    decisions = plan.decisions[before:]
    if as_json:
        print_json(
            {
                "plan": output,
                "decisions": [each.model_dump() for each in decisions],
                "trials": [asdict(trial) for trial in found.trials] if found else [],
                "measured": [row.model_dump() for row in found.measured] if found else [],
            }
        )
        return
    rows = [(each.subject, each.choice, each.reason) for each in decisions]
    console().print(table("hmc tune", ("tried", "", "measured"), rows))
    if found is not None:
        _say_search(found)
    click.echo(f"wrote {output}")


def _say_search(found: Found) -> None:
    kept = sum(trial.kept for trial in found.trials)
    rates = ", ".join(f"{row.kind} {row.tokens_per_second:.2f} tokens/s" for row in found.measured)
    click.echo(f"{len(found.trials)} changes tried, {kept} kept: {rates}")
