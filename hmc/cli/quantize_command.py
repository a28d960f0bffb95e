"""`hmc quantize`."""

from __future__ import annotations

import click

from hmc.cli.arguments import count
from hmc.cli.output import JSON, console, print_json, progress, table
from hmc.cli.planned import located


@click.command("quantize")
@click.argument("model")
@click.option(
    "-o",
    "--output",
    required=True,
    type=click.Path(file_okay=False),
    metavar="DIR",
    help="The directory to write; one that was begun is finished.",
)
@click.option(
    "--format", "form", required=True, metavar="int4|mxfp4|fp8", help="How to store matrices."
)
@count("--group", help="Columns that share a scale [default: 32; fp8 has blocks of 128 x 128].")
@click.option(
    "--experts-only", is_flag=True, help="Leave attention and shared experts as they are."
)
@JSON
def command(
    model: str, output: str, form: str, group: int, experts_only: bool, as_json: bool
) -> None:
    """Write a LOSSY copy of MODEL, a directory or a hub id, whose weights are fetched, in few bits,
    as a compressed-tensors checkpoint that hmc and other engines read.

    One matrix is in memory at a time. Routers, norms, embeddings and the output layer stay as they
    are. The report says what each tensor lost, |w - w'| / |w|; plans made from the copy say that it
    is lossy.
    """
    from hmc.quantize.write import REPORT_NAME, quantize

    source = located(model, weights=True)
    with progress() as report:
        found = quantize(source, output, form, group, experts_only, report)
    if as_json:
        print_json({"output": output, "error": found.error, **vars(found)})
        return
    worst = sorted(found.errors.items(), key=lambda item: -item[1])[:5]
    rows = [(name, f"{error:.4f}") for name, error in worst]
    title = f"{len(found.errors)} tensors as {form}, relative error {found.error:.4f}; the worst"
    console().print(table(title, ("tensor", "error"), rows, numbers=("error",)))
    click.echo(
        f"{output}: all of them in {REPORT_NAME}; {len(found.kept)} modules stay as they were"
    )
