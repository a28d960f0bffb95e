"""`hmc probe`: measure this machine and write it as a machine file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hmc.cli.arguments import positive
from hmc.cli.output import JSON, console, print_json, progress, table
from hmc.machine.detect import profile_path

if TYPE_CHECKING:
    from hmc.bench.probe import Measurement


@click.command("probe")
@click.option(
    "-o",
    "--output",
    type=click.Path(dir_okay=False),
    help="The machine file to write [default: the profile that run and bench look for].",
)
@click.option("--quick", is_flag=True, help="Fewer passes over less memory: rougher, in seconds.")
@positive("--threads", help="Native workers [default: HMC_THREADS, or one a core].")
@JSON
def command(output: str | None, quick: bool, threads: int | None, as_json: bool) -> None:
    """Measure this machine: streaming reads by threads and NUMA node, decode matmuls by format and
    tokens, prefill matmuls, attention, barriers; and where PyTorch finds a GPU, its copies, memory,
    matmuls and latencies.

    Figures are medians with least and most. The file goes to `hmc compile --machine FILE`, `hmc
    simulate --machine FILE`. Nothing else should run meanwhile.
    """
    from hmc.bench.probe import FULL, QUICK, probe, save

    with progress() as report:
        found = probe(QUICK if quick else FULL, threads=threads, report=report)
    target = Path(output) if output else profile_path()
    if output is None:
        target.parent.mkdir(parents=True, exist_ok=True)
    save(found.machine, target)
    if as_json:
        print_json(
            {
                "machine": str(target),
                "name": found.machine.name,
                "gpus": len(found.machine.gpus),
                "measurements": [each.as_json() for each in found.measurements],
            }
        )
        return
    rows = [
        (each.what, *(_words(each, value) for value in (each.median, *ends)), each.detail)
        for each in found.measurements
        for ends in [(min(each.values), max(each.values))]
    ]
    columns = ("", "median", "least", "most", "of")
    console().print(table("hmc probe", columns, rows, numbers=columns[1:4]))
    click.echo(f"{target}: {found.machine.cpu}, {len(found.machine.gpus)} GPU(s)")


def _words(each: Measurement, value: float) -> str:
    """The value in the unit of its kind: GB/s, GFLOP/s or microseconds."""
    if each.unit == "s":
        return f"{value * 1e6:.2f} us"
    return f"{value / 1e9:.2f} G{each.unit}"
