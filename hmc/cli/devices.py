"""The options of the commands that run plans: what runs them, and where their weights are; and what
these commands say of devices.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from hmc.cli.arguments import option

if TYPE_CHECKING:
    from hmc.runtime.executor import Executor

DEVICES = option(
    "--devices",
    type=click.Choice(["auto", "cuda", "host"]),
    default="auto",
    help="What runs a plan's GPU steps: this machine's GPUs (auto, cuda), or threads and memory of"
    " the CPU in their place (host), for tests and debugging.",
)

GPUS = option(
    "--gpus",
    type=int,
    metavar="N",
    help="Drive each of the N GPUs that share long prompts by a process of its own; N is the plan's"
    " [default: one process drives all].",
)

HOME = option(
    "--home",
    type=click.Choice(["mapped", "arena", "shared"]),
    default="mapped",
    help="Weights in the page cache, copied to huge pages, or to a memory file that the processes"
    " of --gpus share.",
)


@contextmanager
def telling(executor: Executor) -> Iterator[None]:
    """Say on stderr what is pinned for GPUs and how decode is handed over to them; and once more
    after the block where that has changed in it, since a GPU refused what was tried.
    """
    before = executor.handover
    for told in filter(None, (executor.pinned, before)):
        click.echo(f"[{told}]", err=True)
    yield
    if executor.handover != before:
        click.echo(f"[{executor.handover}]", err=True)
