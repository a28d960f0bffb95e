"""`hmc serve`: a plan behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import click

from hmc.cli.arguments import CHECKPOINT, DUMMY_WEIGHTS, THREADS, option, placed, positive
from hmc.errors import UsageError
from hmc.machine.detect import machine_here
from hmc.plan import load_plan


@click.command("serve")
@click.argument("plan_path", metavar="PLAN")
@CHECKPOINT
@option("--host", default="127.0.0.1", help="Address to listen on; give a key too.")
@option(
    "--port", type=click.IntRange(0, 65535), default=8000, metavar="N", help="0: any free port."
)
@option(
    "--api-key", metavar="KEY", help="What clients have to send [default: HMC_API_KEY, else none]."
)
@positive("--max-queue", default=64, help="Requests that may wait.")
@option("--served-name", metavar="NAME", help="The model's name [default: the plan's file].")
@option(
    "--watchdog",
    type=click.FloatRange(min=0, min_open=True),
    default=300.0,
    metavar="SECONDS",
    help="A step longer than this hangs: requests fail, /health says why.",
)
@THREADS
@option(
    "--prefill-process",
    type=click.Choice(["auto", "on", "off"]),
    default="auto",
    help="Compute long prompts in a process beside the decoding, on cores of its own; auto: where"
    " the machine's rates predict that it helps.",
)
@option("--prefill-threads", type=int, metavar="N", help="Of the threads, those of that process.")
@placed
@DUMMY_WEIGHTS
def command(
    plan_path: str,
    host: str,
    port: int,
    api_key: str | None,
    served_name: str | None,
    watchdog: float,
    threads: int | None,
    prefill_process: Literal["auto", "on", "off"],
    prefill_threads: int | None,
    home: Literal["mapped", "arena", "shared"],
    **others: Any,
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
        threads=threads,
        api_key=key or None,
        watchdog_seconds=watchdog,
        prefill=decision,
        home=home,
        **others,
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
