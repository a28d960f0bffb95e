"""`hmc bench predict`: the simulator's figures beside measured ones, for models of real shapes."""

from __future__ import annotations

from statistics import median
from typing import Any

import click

from hmc.cli.arguments import POSITIVE, REPETITIONS, Several, circumstances, count, option, positive
from hmc.cli.output import JSON, console, print_json, progress, table
from hmc.cli.planned import located
from hmc.errors import MachineError, UsageError
from hmc.machine.detect import available_bytes, how_to, profile_path, rated_machine


@click.command("predict", short_help="Predictions for models of real shapes beside measurements.")
@click.argument("configs", nargs=-1, required=True, metavar="CONFIG..")
@option("--formats", type=Several(click.STRING), default="fp8,bf16", metavar="F,..")
@option("--contexts", type=Several(POSITIVE), default="128,4096", metavar="N,..")
@option("-p", "--prompts", type=Several(POSITIVE), default="512,2048", metavar="N,..")
@positive("-n", "--tokens", default=16, help="Steps around each context.")
@REPETITIONS
@option(
    "--memory", type=float, metavar="GB", help="Weights at most [default: half of what is free]."
)
@count("--layers", help="Cut to N layers [default: what fits].")
@count("--experts", help="Cut to N experts a layer.")
@count("--megabytes", help="As in `hmc bench`.")
@option(
    "--machine", metavar="FILE", help="The rates [default: the profile that `hmc probe` saved]."
)
@JSON
def predict(
    configs: tuple[str, ...],
    formats: list[str],
    memory: float | None,
    machine: str | None,
    as_json: bool,
    **loads: Any,
) -> None:
    """Decode and prefill of each CONFIG (a model directory, config.json or hub id), predicted and
    measured.

    Weights are random, in each of the formats; models are cut in depth to what memory allows, and
    in experts where a single layer is too large. "Memory" is the streaming read between the decode
    steps over the one that the machine file holds: far from 100 %, this is not the machine that was
    probed, or others use it.

    \b
    hmc bench predict examples/configs/qwen3-30b-a3b examples/configs/deepseek-v3 --machine m.json
    """
    from hmc.bench.predict import FORMATS, compare

    if unknown := [each for each in formats if each not in FORMATS]:
        raise UsageError(f"--formats {unknown[0]}: give some of {', '.join(FORMATS)}")
    if machine is None and not profile_path().exists():
        raise MachineError(how_to())
    rated = rated_machine(machine or str(profile_path()))
    limit = int(memory * 1e9) if memory else available_bytes() // 2
    paths = [located(config, weights=False) for config in configs]
    rows: list[dict[str, Any]] = []
    with progress() as report:
        for path in paths:
            for form in formats:
                rows += compare(path, form, rated, memory=limit, report=report, **loads)
    error = median(abs(row["error"]) for row in rows)
    if as_json:
        more = circumstances("", rated.cores)
        print_json({"rows": rows, "median_error": error, "rates_of": rated.name, **more})
        return
    columns = ("model", "layers", "experts", "test", "measured", "predicted", "error", "memory")
    lines = [
        (
            f"{row['model']} {row['format']}",
            *(row[name] for name in columns[1:4]),
            f"{row['measured_tokens_per_second']:.2f} ± {(row['high'] - row['low']) / 2:.2f}",
            f"{row['predicted_tokens_per_second']:.2f}",
            f"{row['error']:+.1%}",
            "-" if row["memory_drift"] is None else f"{row['memory_drift']:.0%}",
        )
        for row in rows
    ]
    console().print(table("Tokens/s, predicted and measured", columns, lines, numbers=columns[1:]))
    click.echo(f"median error {error:.1%} of {len(rows)} rows")
