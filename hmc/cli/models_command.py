"""`hmc models`: the families hmc reads, and what each needs."""

from __future__ import annotations

import click

from hmc.cli.output import JSON, console, print_json, records, table


@click.command("models")
@JSON
@click.option("--markdown", "as_markdown", is_flag=True, help="Print docs/models.md.")
def command(as_json: bool, as_markdown: bool) -> None:
    """List the model families that hmc reads, by the model_type of their config.json: what each
    needs beyond grouped-query attention, softmax routing and gated SiLU experts, published models,
    and how near its logits come to transformers in FP32, against transformers in BF16. Installed
    packages add families under the entry point group hmc.families.
    """
    from hmc.models import FAMILIES, all_families
    from hmc.models.measured import Measured, markdown, measured

    if as_markdown:
        click.echo("\n".join(markdown([row for _, row in sorted(FAMILIES.items())])))
        return
    found, _ = measured()
    rows = [
        (
            row.model_type,
            row.needs,
            ", ".join(row.published),
            found.get(row.model_type, Measured()).parity,
        )
        for _, row in sorted(all_families().items())
    ]
    columns = ("model_type", "needs", "published", "parity")
    if as_json:
        print_json(records(columns, rows))
    else:
        console().print(table("Families", columns, rows))
