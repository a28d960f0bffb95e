"""`hmc serve`: plans behind an OpenAI-compatible HTTP server."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

import click

from hmc.cli.arguments import (
    CHECKPOINT,
    DUMMY_WEIGHTS,
    THREADS,
    Duration,
    option,
    placed,
    positive,
)
from hmc.cli.planned import Planned, planned
from hmc.errors import UsageError
from hmc.machine.detect import machine_here


@click.command("serve")
@click.argument("plan_paths", metavar="PLAN|MODEL...", nargs=-1, required=True)
@CHECKPOINT
@option("--host", default="127.0.0.1", help="Address to listen on; give a key too.")
@option(
    "--port", type=click.IntRange(0, 65535), default=8000, metavar="N", help="0: any free port."
)
@option("--unix-socket", metavar="PATH", help="Listen there, and on no port.")
@option(
    "--api-key", metavar="KEY", help="What clients have to send [default: HMC_API_KEY, else none]."
)
@option("--api-key-file", metavar="FILE", help="Keys, one a line; each is accepted.")
@option(
    "--allowed-host",
    "allowed_hosts",
    multiple=True,
    metavar="NAME",
    help="Answer requests for this name too (*: any) [default: on a loopback address its names"
    " alone, else any].",
)
@option(
    "--allow-origin",
    "allowed_origins",
    multiple=True,
    metavar="ORIGIN",
    help="Let pages of https://ORIGIN use the server (*: all).",
)
@option(
    "--access-log",
    type=click.Choice(["off", "text", "json"]),
    default="off",
    help="A line for every request on stderr; those that fail for the server's fault have one.",
)
@option(
    "--drain-seconds",
    type=click.FloatRange(min=0),
    default=60.0,
    metavar="SECONDS",
    help="After SIGTERM, for what has been accepted.",
)
@positive("--max-queue", default=64, help="Requests that may wait.")
@option(
    "--name",
    "--served-name",
    "served_name",
    metavar="NAME",
    help="The model's name, where there is one [default: that of the plan's file or the model].",
)
@option(
    "--preload",
    multiple=True,
    metavar="NAME",
    help="Of several plans, load this one at the start; the others when they are asked for. One"
    " plan always is.",
)
@option(
    "--idle-unload",
    "idle_seconds",
    type=Duration(),
    default="0",
    metavar="TIME",
    help="Unload what was unused for so long: 90s, 10m, 2h. 0: never.",
)
@option(
    "--load-timeout",
    "load_seconds",
    type=Duration(zero=False),
    default="5m",
    metavar="TIME",
    help="A request waits so long for its plan, and for memory that others in use hold.",
)
@positive(
    "--models-max",
    "most_loaded",
    help="Plans that are loaded at a time [default: as many as memory holds].",
)
@option(
    "--request-seconds",
    type=click.FloatRange(min=0),
    default=0.0,
    metavar="SECONDS",
    help="What a request may take, from its place in the queue to its last token [default: as long"
    " as it takes].",
)
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
    plan_paths: tuple[str, ...],
    dummy_weights: bool,
    host: str,
    port: int,
    unix_socket: str | None,
    checkpoint: str | None,
    api_key: str | None,
    api_key_file: str | None,
    allowed_hosts: tuple[str, ...],
    served_name: str | None,
    preload: tuple[str, ...],
    watchdog: float,
    threads: int | None,
    prefill_process: Literal["auto", "on", "off"],
    prefill_threads: int | None,
    home: Literal["mapped", "arena", "shared"],
    **others: Any,
) -> None:
    """Serve plans, or models (a directory, a .gguf file or a hub id), which are compiled into hmc's
    cache first, over HTTP as OpenAI's clients speak it; http://HOST:PORT/ shows a page.

    Several are called by the names of their files, each loaded when a request names it and unloaded
    when another one needs its memory.

    SIGTERM or Ctrl-C finishes what has been accepted, within --drain-seconds, and ends; a second
    one ends at once.

    \b
    hmc serve plan.hmp --port 8000
    curl localhost:8000/v1/completions -H 'Content-Type: application/json' \\
         -d '{"model": "plan", "prompt": "In the beginning"}'
    hmc serve small.hmp large.hmp --idle-unload 10m
    """
    if prefill_threads is not None and prefill_process == "off":
        raise UsageError("--prefill-threads: there is no such process with --prefill-process off")
    if len(plan_paths) > 1:
        _check_several(served_name, checkpoint)
    keys = _keys(api_key, api_key_file)
    plans = [planned(path, checkpoint, dummy_weights=dummy_weights) for path in plan_paths]
    names = _names(plans, plan_paths, served_name, preload)
    disaggregation, hosts, models, server, service = _extras()
    found = []
    for name, each in zip(names, plans, strict=True):
        plan = each.plan
        decision = disaggregation.decide(
            plan,
            prefill_process,
            machine=machine_here(plan.machine) if prefill_process != "off" else None,
            threads=threads,
            prefill_threads=prefill_threads,
        )
        if decision.division is not None and home != "mapped":
            raise UsageError(
                f"--home {home}: the prefill process shares mapped weights; leave it out"
            )
        settings = service.Settings(
            name=name,
            checkpoint=each.checkpoint,
            dummy_weights=dummy_weights,
            threads=threads,
            api_keys=keys,
            allowed_hosts=hosts.allowed_hosts(host, allowed_hosts),
            watchdog_seconds=watchdog,
            prefill=decision,
            home=home,
            **others,
        )
        found.append(models.Model(plan, settings))
    server.serve(models.Models(found, preload), host, port, unix_socket)


def _check_several(name: str | None, checkpoint: str | None) -> None:
    """Refuse what is said of one plan where there are several."""
    for option_name, given in (("--name", name), ("--checkpoint", checkpoint)):
        if given is not None:
            raise UsageError(f"{option_name} {given}: there are several plans; serve one")


def _names(
    plans: list[Planned], paths: tuple[str, ...], given: str | None, preload: tuple[str, ...]
) -> list[str]:
    """What the plans are called; `UsageError` for two of one name, and a `preload` that is none."""
    names = [given or plan.name for plan in plans]
    for number, name in enumerate(names):
        if name in names[:number]:
            first = paths[names.index(name)]
            raise UsageError(
                f"{first} and {paths[number]} are both called {name}: rename one of the files"
            )
    for name in preload:
        if name not in names:
            raise UsageError(f"--preload {name}: there are {', '.join(names)}")
    return names


def _keys(given: str | None, file: str | None) -> tuple[str, ...]:
    """What clients may send; () where no key is asked for. `UsageError` for one that is empty."""
    if file is not None:
        if given is not None:
            raise UsageError("--api-key-file: there is an --api-key too; give one")
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise UsageError(f"--api-key-file {file}: cannot be read: {error}") from error
        if keys := tuple(line.strip() for line in lines if line.strip()):
            return keys
        raise UsageError(f"--api-key-file {file}: there is no key in it")
    where, key = "--api-key", given
    if key is None:
        where, key = "HMC_API_KEY", os.environ.get("HMC_API_KEY")
    if key is not None and not key.strip():
        raise UsageError(f"{where}: it is empty; leave it out to serve without a key")
    return () if key is None else (key,)


def _extras() -> tuple[Any, Any, Any, Any, Any]:
    """What decides on processes, and of hmc.serve, which needs packages that hmc alone does not
    bring: hosts, models, server, service.
    """
    try:
        from hmc.runtime.prefill import disaggregation
        from hmc.serve import hosts, models, server, service
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] == "hmc":
            raise
        raise UsageError(
            f"hmc serve needs the package {error.name}: pip install 'hmc[serve]'"
        ) from error
    return disaggregation, hosts, models, server, service
