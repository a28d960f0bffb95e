"""`hmc serve`: a plan behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import click

from hmc.cli.arguments import POSITIVE, THREADS
from hmc.cli.devices import DEVICES, GPUS, HOME
from hmc.errors import UsageError
from hmc.machine.here import machine_here
from hmc.plan import load_plan


@click.command("serve")
@click.argument("plan_path", metavar="PLAN")
@click.option("--checkpoint", metavar="DIR", help="Model directory, if it has moved.")
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to listen on; give a key too."
)
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    default=8000,
    show_default=True,
    metavar="N",
    help="0: any free port.",
)
@click.option(
    "--api-key", metavar="KEY", help="What clients have to send [default: HMC_API_KEY, else none]."
)
@click.option(
    "--max-queue",
    type=POSITIVE,
    default=64,
    show_default=True,
    metavar="N",
    help="Requests that may wait.",
)
@click.option("--served-name", metavar="NAME", help="The model's name [default: the plan's file].")
@click.option(
    "--watchdog",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    show_default=True,
    metavar="SECONDS",
    help="A step longer than this hangs: requests fail, /health says why.",
)
@THREADS
@click.option(
    "--prefill-process",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    show_default=True,
    help="Compute long prompts in a process beside the decoding, on cores of its own; auto: where"
    " the machine's rates predict that it helps.",
)
@click.option(
    "--prefill-threads", type=int, metavar="N", help="Of the threads, those of that process."
)
@DEVICES
@GPUS
@HOME
@click.option(
    "--dummy-weights", is_flag=True, help="Random weights: times are real, tokens are not."
)
def command(
    plan_path: str,
    checkpoint: str | None,
    host: str,
    port: int,
    api_key: str | None,
    max_queue: int,
    served_name: str | None,
    watchdog: float,
    threads: int | None,
    prefill_process: Literal["auto", "on", "off"],
    prefill_threads: int | None,
    devices: Literal["auto", "cuda", "host"],
    gpus: int | None,
    home: Literal["mapped", "arena", "shared"],
    dummy_weights: bool,
) -> None:
    """Serve the plan PLAN over HTTP as OpenAI's clients speak it; http://HOST:PORT/ shows a page.

    SIGTERM or Ctrl-C finishes what has been accepted and ends; a second one ends at once.

    \b
    hmc serve plan.hmp --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "plan", "prompt": "In the beginning"}'
    """
    if prefill_threads is not None and prefill_process == "off":
        raise UsageError("--prefill-threads: there is no such process with --prefill-process off")
    key = api_key if api_key is not None else os.environ.get("HMC_API_KEY")
    if api_key == "":
        raise UsageError("--api-key: it is empty")
    plan = load_plan(plan_path)
    server, disaggregation = _extras()
    decision = disaggregation.decide(
        plan,
        prefill_process,
        machine=machine_here(plan.machine) if prefill_process != "off" else None,
        threads=threads,
        prefill_threads=prefill_threads,
    )
    if decision.division is not None and home != "mapped":
        raise UsageError(f"--home {home}: the prefill process shares mapped weights; leave it out")
    settings = server.Settings(
        name=served_name or Path(plan_path).stem,
        checkpoint=checkpoint,
        threads=threads,
        dummy_weights=dummy_weights,
        api_key=key or None,
        max_queue=max_queue,
        watchdog_seconds=watchdog,
        prefill=decision,
        devices=devices,
        home=home,
        gpus=gpus,
    )
    server.serve(plan, settings, host, port)


def _extras() -> tuple[Any, Any]:
    """hmc.serve.server, which needs packages that hmc alone does not bring, and what decides on
    its processes.
    """
    try:
        from hmc.runtime.prefill import disaggregation
        from hmc.serve import server
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "hmc":
            raise
        raise UsageError(
            f"hmc serve needs the package {error.name}: pip install 'hmc[serve]'"
        ) from error
    return server, disaggregation
