"""The option `--devices` of the commands that run plans."""

from __future__ import annotations

import click

DEVICES = click.option(
    "--devices",
    type=click.Choice(["auto", "cuda", "host"]),
    default="auto",
    show_default=True,
    help="What runs a plan's GPU steps: this machine's GPUs (auto, cuda), or threads and memory of"
    " the CPU in their place (host), for tests and debugging.",
)
