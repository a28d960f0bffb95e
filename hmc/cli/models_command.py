"""`hmc models`: the families hmc reads, and what each needs."""

from __future__ import annotations

import click

from hmc.cli.output import JSON, console, print_json, records, table


@click.command("models")
@JSON
def command(as_json: bool) -> None:
    """List the model families that hmc reads, by the model_type of their config.json: what each
    needs beyond grouped-query attention, softmax routing and gated SiLU experts, and published
    models. Installed packages add families under the entry point group hmc.families.
    """
    from hmc.models import all_families

    rows = [
        (row.model_type, row.needs, ", ".join(row.published))
        for _, row in sorted(all_families().items())
    ]
    columns = ("model_type", "needs", "published")
    if as_json:
        print_json(records(columns, rows))
    else:
        console().print(table("Families", columns, rows))
