"""`hmc bench`: its commands, and what a TARGET without one of their names means."""

from __future__ import annotations

import click

from hmc.cli.bench.formats import formats
from hmc.cli.bench.kernels import kernels
from hmc.cli.bench.model import model
from hmc.cli.bench.predict import predict
from hmc.cli.bench.serve import serve


class _Bench(click.Group):
    """A first word that names no command is the TARGET of `model`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        if args and args[0] not in (*self.commands, *ctx.help_option_names):
            args = ["model", *args]
        return super().parse_args(ctx, args)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(
    "bench",
    cls=_Bench,
    commands=[model, kernels, formats, predict, serve],
    options_metavar="",
    subcommand_metavar="TARGET [OPTIONS] | COMMAND ...",
)
def command() -> None:
    """Measure a plan, a model shape, single kernels, formats, predictions or a server.

    A TARGET alone is measured by the command "model"; each command has its own --help.

    \b
    hmc bench plan.hmp -p 512,2048 -n 64
    hmc bench config.json --dummy-weights --layers 8 -p 0 --batch 1,2,4,6
    hmc bench kernels --format fp8 --shape 2048x7168 --tokens 1,4
    """
