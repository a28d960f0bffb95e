"""`hmc report`: a plan as one self-contained HTML page."""

from __future__ import annotations

from pathlib import Path

import click

from hmc.cli.arguments import output
from hmc.cli.output import JSON, print_json, size
from hmc.errors import PlanError
from hmc.files import write_file
from hmc.plan import load_plan


@click.command("report")
@click.argument("plan_path", metavar="PLAN")
@output("page (.html)")
@click.option(
    "--measured",
    metavar="FILE",
    help="What `hmc bench --json` printed for this plan [default: what is stored beside the plan].",
)
@JSON
def command(plan_path: str, output: str, measured: str | None, as_json: bool) -> None:
    """Write a page about the plan PLAN: placement heat map, memory, timelines of a decode step and
    of a prefill, roofline, predicted against measured, and every decision with its reason.

    The page is one file that loads nothing, for light and dark screens.
    """
    plan = load_plan(plan_path)
    from hmc.predict import measured as store
    from hmc.report.page import render

    rows = store.read(plan_path, plan) if measured is None else store.of_bench(measured)
    page = render(plan, Path(plan_path).name, rows)
    write_file(output, page, "the report", PlanError)
    written = len(page.encode())
    if as_json:
        print_json({"report": output, "bytes": written, "measured": len(rows)})
    else:
        click.echo(f"{output}: {size(written)}, {len(rows)} measured figures")
