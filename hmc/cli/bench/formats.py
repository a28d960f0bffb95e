"""`hmc bench formats`: the table of docs/formats.md, measured on this machine."""

from __future__ import annotations

import dataclasses

import click

from hmc.cli.arguments import THREADS, Several, Shape, circumstances, count, option, positive
from hmc.cli.output import JSON, print_json, progress
from hmc.errors import UsageError


@click.command("formats", short_help="Every weight format: what it is, and how fast it is read.")
@option("--format", "names", type=Several(click.STRING), metavar="F,..", help="[default: all]")
@option("--shape", type=Shape(), default="2048x7168", metavar="ROWSxK", help="Of the matrices.")
@option("--group", default=128, metavar="G", help="Columns that share a scale, where groups do.")
@option("--isa", metavar="TIER", help="Kernel tier [default: the best this machine has].")
@positive("--repetitions", default=9, metavar="R")
@THREADS
@count("--megabytes", help="Weights to go through in a pass [default: 640].")
@JSON
def formats(
    names: list[str] | None,
    shape: tuple[int, int],
    group: int,
    isa: str | None,
    repetitions: int,
    threads: int | None,
    megabytes: int,
    as_json: bool,
) -> None:
    """Print the table of docs/formats.md as Markdown.

    Of each format the kernels of one token are measured: GB/s of one core from its L2, the fastest
    streaming read from memory beside them, the share of it at one token and at four, and the
    relative error of a product against float64.

    \b
    hmc bench formats
    hmc bench formats --format fp8,int4 --isa avx2
    """
    from hmc.bench.formats import measure, table
    from hmc.bench.kernels import DEFAULT_MEGABYTES
    from hmc.codegen.isa import TIERS, best_isa, require
    from hmc.formats import FORMATS, format_of

    if isa is not None and isa not in TIERS:
        raise UsageError(f"--isa {isa}: no such kernel tier; choose from {', '.join(TIERS)}")
    tier = best_isa() if isa is None else require(isa)
    chosen = [format_of(name).name for name in names or FORMATS]
    rows, k = shape
    with progress() as report:
        measured = measure(
            tier,
            chosen,
            rows=rows,
            k=k,
            group=group,
            threads=threads,
            repetitions=repetitions,
            megabytes=megabytes or DEFAULT_MEGABYTES,
            report=report,
        )
    said = circumstances(tier.name, threads or 0)
    if as_json:
        found = {name: dataclasses.asdict(each) for name, each in measured.items()}
        print_json({"formats": found, **said})
        return
    click.echo(table(chosen, measured))
    click.echo(f"{said['date'][:10]}, {said['machine']}, {tier.name}, {rows}x{k}.")
