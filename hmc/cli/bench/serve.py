"""`hmc bench serve`: a load generator against a server, or against a plan it serves itself."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.cli.arguments import count, invocation, option, positive
from hmc.cli.output import JSON, console, print_json, table
from hmc.cli.planned import planned
from hmc.errors import ExecutionError, UsageError

if TYPE_CHECKING:
    from hmc.bench.serve.load import Lengths, Shot

_LINES = 200  # of a server's messages that are kept


@click.command("serve", short_help="Requests to a server: latencies, throughput, goals met.")
@click.argument("target", metavar="URL|PLAN|MODEL")
@positive("-n", "--requests", default=32)
@option(
    "--rate",
    type=click.FloatRange(min=0, min_open=True),
    metavar="R",
    help="Poisson arrivals, R a second [default: all at once].",
)
@count("--concurrency", help="At most N requests at a time; 0: no limit.")
@option("--prompt", "prompts", default="128-512", metavar="N-M", help="Tokens.")
@option("--output", "outputs", default="32-128", metavar="N-M", help="Tokens.")
@option(
    "--trace",
    metavar="FILE",
    help='JSON lines {"arrival": seconds, "prompt": tokens, "output": tokens}.',
)
@count(
    "--prefill",
    help="Instead: one prompt (the longest of --prompt) beside N decoding requests (the shortest,"
    " with the longest --output), against both alone.",
)
@count(
    "--streams",
    help="Instead: N answers at once (the shortest of --prompt, the longest of --output), for the"
    " server's share of a decode step.",
)
@option("--slo", default="", metavar="GOALS", help="Such as ttft=30s,tps=20.")
@count("--seed")
@option("--api-key", metavar="KEY", help="[default: HMC_API_KEY]")
@option("--serve-options", default="", metavar="TEXT", help="For `hmc serve` of a plan or a model.")
@JSON
def serve(
    target: str,
    requests: int,
    rate: float | None,
    concurrency: int,
    prompts: str,
    outputs: str,
    trace: str | None,
    prefill: int,
    streams: int,
    slo: str,
    seed: int,
    api_key: str | None,
    serve_options: str,
    as_json: bool,
) -> None:
    """Send requests to a server at URL, or to a plan or a model served for the length of the test,
    and report time to first token (TTFT), time per output token after it (TPOT), throughput, and
    the share of requests that met the goals.

    Prompts are random tokens, answers are greedy and ignore the end-of-text token.

    \b
    hmc bench serve http://127.0.0.1:8000 --rate 2 --slo ttft=30s,tps=20
    hmc bench serve plan.hmp --concurrency 4 --prompt 128-1024 --output 64-256
    hmc bench serve plan.hmp --prefill 2 --prompt 32-1024
    hmc bench serve plan.hmp --streams 32 --prompt 16 --output 64
    """
    try:
        from hmc.bench.serve.client import Target
        from hmc.bench.serve.run import beside, load
        from hmc.bench.serve.run import streams as measure_streams
    except ModuleNotFoundError as error:
        raise UsageError(
            f"hmc bench serve needs the package {error.name}: pip install 'hmc[serve]'"
        ) from error
    from hmc.bench.serve.load import Lengths
    from hmc.predict.goals import parse_goals

    if prefill and streams:
        raise UsageError("--prefill and --streams are two measurements: give one of them")
    mixes = Lengths.read("--prompt", prompts), Lengths.read("--output", outputs)
    goals = parse_goals(slo, lengths=False)
    shots = _shots(requests, rate, mixes, trace, seed)
    key = api_key or os.environ.get("HMC_API_KEY")
    with _served(target, serve_options.split()) as url:
        server = Target(url, key)
        if prefill:
            short, long, output = mixes[0].least, mixes[0].most, mixes[1].most
            found: dict[str, Any] = beside(
                server, prefill, prompt=long, short=short, output=output, seed=seed
            )
            show = _print_beside
        elif streams:
            prompt, output = mixes[0].least, mixes[1].most
            found = measure_streams(server, streams, prompt=prompt, output=output, seed=seed)
            show = _print_streams
        else:
            found = load(server, shots, concurrency=concurrency, seed=seed, goals=goals)
            show = _print_load
    print_json({**found, "target": target, **invocation()}) if as_json else show(found)
    if found.get("failed") and found["failed"] == found["requests"]:
        raise ExecutionError(f"every request failed: {found['errors'][0]}")


def _shots(
    requests: int,
    rate: float | None,
    mixes: tuple[Lengths, Lengths],
    trace: str | None,
    seed: int,
) -> list[Shot]:
    import numpy as np

    from hmc.bench.serve import load as serve_load

    if trace is not None:
        if rate is not None:
            raise UsageError("--trace has arrivals of its own: leave out --rate")
        return serve_load.trace(Path(trace))
    random = np.random.default_rng(seed)
    if rate is not None:
        return serve_load.poisson(requests, rate, *mixes, random)
    return serve_load.at_once(requests, *mixes, random)


@contextmanager
def _served(target: str, options: list[str]) -> Iterator[str]:
    """The server's address: TARGET itself, or of a process that serves it."""
    if target.startswith(("http://", "https://")):
        if options:
            raise UsageError("--serve-options goes with a plan or a model, not with a URL")
        yield target
        return
    from hmc.bench.serve.client import wait_ready

    # here, where its words are seen: compiled into the cache and fetched, if it is a model
    path = planned(target, dummy_weights="--dummy-weights" in options).path or target
    command = [sys.executable, "-m", "hmc", "serve", path, "--port", "0", *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said: deque[str] = deque(maxlen=_LINES)
        found = None
        for line in process.stderr:
            said.append(line)
            if found := re.search(r" on (http://\S+)$", line.strip()):
                break
        if found is None:
            raise ExecutionError(f"hmc serve: {''.join(said).strip()}")
        # Somebody has to read what it says, or it waits for room in the pipe.
        reader = threading.Thread(target=said.extend, args=(process.stderr,))
        reader.start()
        try:
            wait_ready(found[1], lambda: process.poll() is None)
            yield found[1]
        finally:
            crashed = process.poll()
            process.terminate()
            reader.join()
            if crashed is not None:
                click.echo(f"hmc serve ended with status {crashed}: {''.join(said)}", err=True)


def _print_load(found: dict[str, Any]) -> None:
    rows = []
    for name, label in (("ttft", "TTFT"), ("tpot", "TPOT"), ("total", "whole answer")):
        values = found[name]
        rows.append((label, *(_milliseconds(values[p]) for p in ("p50", "p90", "p99", "mean"))))
    columns = ("ms", "p50", "p90", "p99", "mean")
    console().print(table("hmc bench serve", columns, rows, numbers=columns[1:]))
    rate = found["output_tokens_per_second"]
    click.echo(
        f"{found['requests']} requests, {found['failed']} failed, in {found['seconds']:.2f} s:"
        f" {found['output_tokens']} tokens, {'-' if rate is None else f'{rate:.1f}'} tok/s"
    )
    for error in found["errors"]:
        click.echo(f"failed: {error}")
    goals = found["slo"]
    words = [f"TTFT <= {goals['ttft']:g} s"] if goals["ttft"] else []
    words += [f">= {goals['tps']:g} tok/s"] if goals["tps"] else []
    if words:
        click.echo(f"{found['slo_attainment']:.1%} of all requests met {' and '.join(words)}")
    if found["scheduler_own_share"] is not None:
        click.echo(f"{found['scheduler_own_share']:.1%} of the steps was the scheduler's own")


def _print_beside(found: dict[str, Any]) -> None:
    rows = [
        (
            f"TTFT of {found['prompt']} tokens",
            _milliseconds(found["ttft_alone"]),
            _milliseconds(found["ttft_together"]),
            f"{found['ttft_rise']:+.1%}",
        ),
        (
            f"TPOT of {found['decodes']} decoding",
            _milliseconds(found["tpot_alone"]),
            _milliseconds(found["tpot_together"]),
            f"x {found['tpot_factor']:.2f}",
        ),
    ]
    columns = ("ms", "alone", "together", "change")
    console().print(table("One prompt beside decoding", columns, rows, numbers=columns[1:]))


def _print_streams(found: dict[str, Any]) -> None:
    step = found["step"]
    rows = [
        ("a step, as clients see it", step, None),
        ("the executor undisturbed", found["undisturbed"], 1 - found["server_share"]),
        ("the server: the rest", step - found["undisturbed"], found["server_share"]),
        (
            "- within the scheduler's step",
            found["scheduler_share"] * step,
            found["scheduler_share"],
        ),
        ("- between the scheduler's steps", found["between_share"] * step, found["between_share"]),
        ("- the executor's calls, later", found["executor"] - found["undisturbed"], None),
        ("the client's processor time", found["client_cpu"], found["client_share"]),
    ]
    columns = ("ms", "a step", "share")
    cells = [
        (label, _milliseconds(seconds), "" if share is None else f"{share:.1%}")
        for label, seconds, share in rows
    ]
    title = f"{found['streams']} streams, {found['steps']} steps of all"
    console().print(table(title, columns, cells, numbers=columns[1:]))


def _milliseconds(seconds: float | None) -> str:
    return "-" if seconds is None else f"{1000 * seconds:.2f}"
