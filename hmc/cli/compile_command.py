"""`hmc compile`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.checkpoint.location import model_name
from hmc.cli import hub
from hmc.cli.arguments import option, output
from hmc.cli.output import JSON, print_json, size
from hmc.cli.summary import memory, prediction
from hmc.plan import Plan, save_plan
from hmc.plan.options import SNAPSHOT_GB

if TYPE_CHECKING:
    from hmc.hub.planning import HubPlan


@click.command("compile")
@click.argument("model")
@output("plan (.hmp)", default="the model's name and .hmp, in this folder")
@option(
    "--machine",
    default="auto",
    metavar="NAME|FILE",
    help="`auto` (this machine), a named machine or a machine file.",
)
@option(
    "--max-context",
    default=0,
    metavar="N",
    help="Tokens one sequence may hold [default: what fits].",
)
@option("--max-chunk", default=512, metavar="N", help="Prompt tokens computed at once.")
@option("--threads", default=0, metavar="N", help="Native workers [default: one a core].")
@option("--dummy-weights", is_flag=True, help="Need config.json alone; run with random weights.")
@option("--layers", default=0, metavar="N", help="With --dummy-weights: cut the depth to N layers.")
@option(
    "--family", default="", metavar="NAME", help="Read MODEL as one of this family; see hmc models."
)
@option("--vram", default=0.0, metavar="GB", help="Use so much of each GPU [default: all].")
@option(
    "--concurrency",
    default=1,
    metavar="C",
    help="Whole contexts the cache must hold; at least 16 sequences decode at a time.",
)
@option(
    "--cache-tokens",
    default=0,
    metavar="N",
    help="Tokens the cache holds of all sequences [default: what half of the free memory holds, up"
    " to a context each].",
)
@option(
    "--snapshot-memory",
    default=SNAPSHOT_GB,
    metavar="GB",
    help="Where layers keep states a sequence: memory for those of prompts, from which others that"
    " begin alike go on; 0: no prompt is reused.",
)
@option(
    "--attention",
    type=click.Choice(["triton", "flashinfer"]),
    default="triton",
    help="Kernels that attend on GPUs in decode; flashinfer needs hmc[flashinfer].",
)
@option(
    "--lm-head",
    type=click.Choice(["auto", "stored", "screened"]),
    default="auto",
    help="Read the output matrix as stored in each decode step, or screen it by an 8-bit copy where"
    " the best logits will do: the same tokens [auto: where it pays].",
)
@option("--slo", default="", metavar="GOALS", help="Refuse a plan that misses ttft=30s@32k,tps=20.")
@option("--routing-profile", default="", metavar="FILE", help="Recorded routing, for hot experts.")
@hub.FETCH
@JSON
def command(
    model: str, output: str | None, fetch: bool | None, as_json: bool, **options: Any
) -> None:
    """Compile MODEL into a plan: a directory, a .gguf file (the first of a split one), or a hub id:
    org/name, org/name@revision, org/name:file.gguf.

    Reads config.json and the headers of the safetensors shards, or of the GGUF file: no weight is
    loaded. The plan says which kernel computes what in which format, where every expert lives, what
    memory is needed, and why; see `hmc show`.

    Of a hub id, too, headers alone are read at first. Once the plan was shown, the weights are
    fetched into the hub's cache (HF_HOME), finished where they were begun, and checked by hash.
    """
    name = hub.hub_name(model)
    started = time.perf_counter()
    found = None
    if name is not None:
        found = hub.compiled(hub.look_up(name), options)
        plan, called = found.plan, found.name.model
    else:
        from hmc.compiler import compile as compile_plan

        plan, called = compile_plan(model, **options), model_name(Path(model))
    path = output or f"{called}.hmp"
    save_plan(plan, path)
    seconds = time.perf_counter() - started
    if not as_json:
        _say(plan, path, seconds)
    if found is not None:
        click.echo(f"  {prediction(plan)}", err=as_json)
        if _wanted(found, fetch, options["machine"], path):
            hub.fetch(found)
    if as_json:
        fetched = {} if found is None else {"hub": str(found.name), "missing": hub.to_fetch(found)}
        print_json(
            {
                "plan": path,
                "bytes": Path(path).stat().st_size,
                "seconds": round(seconds, 3),
                "family": plan.model.family,
                "isa": plan.isa,
                "memory": plan.ledger_totals,
                "fits": not plan.too_large,
                "max_context": plan.limits.max_context,
                **fetched,
            }
        )


def _say(plan: Plan, path: str, seconds: float) -> None:
    click.echo(
        f"{path}: {plan.model.architecture}, {plan.model.layers} layers x"
        f" {plan.model.experts} experts, context {plan.limits.max_context}, {plan.isa} kernels;"
        f" {size(Path(path).stat().st_size)} in {seconds:.1f} s"
    )
    for line in memory(plan):
        click.echo(line)
    for each in plan.decisions:
        if each.subject == "GPUs":  # that there are, and that the plan leaves alone
            click.echo(f"  GPUs {each.choice}: {each.reason}", err=True)
    if plan.too_large:
        click.echo(
            "  this machine is too small for the plan: `hmc run` will refuse here;"
            " `hmc show` has the ledger",
            err=True,
        )


def _wanted(found: HubPlan, asked: bool | None, machine: str, path: str) -> bool:
    """Whether to fetch the weights; says how to, where not."""
    total = hub.to_fetch(found)
    if not total or asked:
        return True
    fits = machine == "auto" and not found.plan.too_large
    if asked is None and fits and hub.confirmed(found):
        return True
    click.echo(f"[{size(total)} not fetched: `hmc fetch {path}` does that]", err=True)
    return False
