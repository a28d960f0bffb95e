"""`hmc compile`."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import click

from hmc.cli.arguments import option, output
from hmc.cli.output import JSON, print_json, size
from hmc.plan import save_plan


@click.command("compile")
@click.argument("model")
@output("plan (.hmp)")
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
@option("--concurrency", default=1, metavar="C", help="Sequences the cache must hold.")
@option(
    "--attention",
    type=click.Choice(["triton", "flashinfer"]),
    default="triton",
    help="Kernels that attend on GPUs in decode; flashinfer needs hmc[flashinfer].",
)
@option("--slo", default="", metavar="GOALS", help="Refuse a plan that misses ttft=30s@32k,tps=20.")
@option("--routing-profile", default="", metavar="FILE", help="Recorded routing, for hot experts.")
@JSON
def command(model: str, output: str, as_json: bool, **options: Any) -> None:
    """Compile MODEL, a directory or a .gguf file (the first of a split one), into a plan.

    Reads config.json and the headers of the safetensors shards, or of the GGUF file: no weight is
    loaded. The plan says which kernel computes what in which format, where every expert lives, what
    memory is needed, and why; see `hmc show`.
    """
    from hmc.compiler import compile as compile_plan

    started = time.perf_counter()
    plan = compile_plan(model, **options)
    save_plan(plan, output)
    seconds = time.perf_counter() - started
    written = Path(output).stat().st_size
    totals, fits = plan.ledger_totals, not plan.too_large
    if as_json:
        print_json(
            {
                "plan": output,
                "bytes": written,
                "seconds": round(seconds, 3),
                "family": plan.model.family,
                "isa": plan.isa,
                "memory": totals,
                "fits": fits,
                "max_context": plan.limits.max_context,
            }
        )
        return
    click.echo(
        f"{output}: {plan.model.architecture}, {plan.model.layers} layers x"
        f" {plan.model.experts} experts, context {plan.limits.max_context}, {plan.isa} kernels;"
        f" {size(written)} in {seconds:.1f} s"
    )
    for device, total in totals.items():
        click.echo(f"  {device} memory: {size(total)} of {size(plan.machine.memory_of(device))}")
    for each in plan.decisions:
        if each.subject == "GPUs":  # that there are, and that the plan leaves alone
            click.echo(f"  GPUs {each.choice}: {each.reason}", err=True)
    if not fits:
        click.echo(
            "  this machine is too small for the plan: `hmc run` will refuse here;"
            " `hmc show` has the ledger",
            err=True,
        )
