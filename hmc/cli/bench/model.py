"""`hmc bench TARGET`: prefill and decode of a plan or a model shape."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import click

from hmc.checkpoint.location import is_gguf
from hmc.cli.arguments import (
    CHECKPOINT,
    COUNT,
    POSITIVE,
    RATES,
    REPETITIONS,
    THREADS,
    Several,
    circumstances,
    count,
    option,
    placed,
    telling,
)
from hmc.cli.output import JSON, Report, console, print_json, progress, size, table
from hmc.cli.planned import compiled, is_plan
from hmc.cli.predicted import Comparison
from hmc.cli.summary import head_line
from hmc.errors import UsageError
from hmc.plan import load_plan

if TYPE_CHECKING:
    from hmc.bench.model import Row
    from hmc.plan import Plan


@click.command("model", short_help="Prefill and decode of a plan or a model shape.")
@click.argument("target", metavar="TARGET")
@option(
    "-p",
    "--prompts",
    type=Several(COUNT),
    default="512",
    metavar="N,..",
    help="Prompt lengths; 0: none.",
)
@count("-n", "--tokens", default=64, help="Tokens to decode; 0: none.")
@count("--context", help="Tokens in the cache before decoding [default: 0].")
@option(
    "--batch",
    "batches",
    type=Several(POSITIVE),
    default="1",
    metavar="N,..",
    help="Sequences that decode at once; several numbers take turns.",
)
@option(
    "--dummy-weights",
    is_flag=True,
    help="Random weights of the real shapes: config.json is enough.",
)
@count("--layers", help="With --dummy-weights: cut the depth to N layers.")
@REPETITIONS
@option(
    "--phase",
    "phases",
    multiple=True,
    metavar="NAME",
    help="Run prompts or decoding by this phase of the plan, whatever its switch-over points say:"
    " prefill.stream, decode.dual; may be repeated.",
)
@THREADS
@placed
@CHECKPOINT
@option("--by-op", is_flag=True, help="Also show which ops the time of a decode step goes to.")
@count(
    "--megabytes",
    help="Memory the streaming read goes through [default: 1 GiB or 8 x the last-level cache];"
    " small values are for tests: they stay in cache.",
)
@RATES
@JSON
def model(
    target: str,
    prompts: list[int],
    tokens: int,
    context: int,
    batches: list[int],
    dummy_weights: bool,
    layers: int,
    repetitions: int,
    phases: tuple[str, ...],
    threads: int | None,
    home: str,
    checkpoint: str | None,
    by_op: bool,
    megabytes: int,
    machine: str | None,
    as_json: bool,
    **placed: Any,
) -> None:
    """Measure prefill and decode of TARGET: a plan (.hmp), or a model: a directory, a config.json,
    a .gguf file or a hub id.

    A model is compiled in memory. Prints tokens a second (median of the
    repetitions, and half of the distance from the least to the most) and how near the bound that
    is: for decode the MBU, which is the weight bytes of a step over its time and over the best
    streaming read of the same minutes; for prefill the share of the register-only multiply-add
    peak. "Outside" is the share of a decode step in which workers are in no kernel. Where this
    machine's rates are known, "predicted" and its error stand beside (with --json for every step),
    and both are kept in PLAN.measured.json.

    \b
    hmc bench plan.hmp -p 512,2048 -n 64
    hmc bench config.json --dummy-weights --layers 8 -p 0 --batch 1,2,4,6
    """
    lengths = [length for length in prompts if length]
    if dummy_weights and home == "arena":
        raise UsageError("--home arena: dummy weights are in huge pages always")
    from hmc.bench.model import ModelBench, active_bytes, check_tests, total_bytes
    from hmc.runtime.executor import Executor

    with progress() as report:
        longest = max((*lengths, context + tokens))
        plan = _plan(target, longest, max(batches), dummy_weights, layers, threads, report)
        check_tests(plan, lengths, tokens, context, batches)
        named = _named(plan, phases)
        executor = Executor(
            plan,
            Path(checkpoint or plan.checkpoint.path),
            threads=threads,
            dummy_weights=dummy_weights,
            home=home,  # type: ignore[arg-type]
            progress=report,
            **placed,
        )
        options = {"repetitions": repetitions, "megabytes": megabytes}
        try:
            with telling(executor):
                bench = ModelBench(executor, phases=named, report=report, **options)
                prompt_rows = [bench.prompt(length) for length in lengths]
                decode_rows = bench.decodes(tokens, context, batches) if tokens else []
            workers, used = executor.pool.workers, executor.kernels_used
            screened = executor.screened
        finally:
            executor.close()
    rows = [*prompt_rows, *decode_rows]
    compared = Comparison(plan, machine, workers, target if target.endswith(".hmp") else "")
    predicted = [compared.bench(row) for row in rows]
    compared.store("hmc bench")
    # as timed between decode steps, else as in the sweep
    best = bench.memory.swept[bench.memory.variant]
    reference = decode_rows[0].compared.reference if decode_rows else best
    about = plan.model
    facts: dict[str, Any] = {
        "model": f"{about.architecture}, {about.layers} layers",
        "bytes": total_bytes(plan),
        "active_bytes": active_bytes(plan),
        "parameters": about.parameters,
        "active_parameters": about.active_parameters,
        "weights": "dummy" if dummy_weights else home,
        "formats": _formats(plan),
    }
    if as_json:
        print_json(
            {
                "rows": [row.record() | more for row, more in zip(rows, predicted, strict=True)],
                "reference_gbps": round(reference / 1e9, 3),
                "reference": str(bench.memory.variant),
                **facts,
                **circumstances(plan.isa, workers),
                "kernels": list(used),
                "phases": dict(executor.calls),
                "lm_head": dict(screened),
                **({"no_prediction": compared.reason} if compared.reason else {}),
            }
        )
        return
    _print_rows(plan, facts["bytes"], workers, rows, predicted)
    if compared.reason:
        click.echo(compared.reason)
    click.echo(
        f"streaming read {reference / 1e9:.1f} GB/s ({bench.memory.variant}; best of"
        f" {len(bench.memory.swept)} ways); a decode step reads {size(active_bytes(plan))}"
    )
    if line := head_line(screened):
        click.echo(line)
    _print_batches(decode_rows)
    if by_op:
        for row in decode_rows:
            _print_ops(row)


def _named(plan: Plan, names: Sequence[str]) -> dict[str, str]:
    """The phases asked for, by "prefill" or "decode"."""
    there = [phase.name for phase in plan.phases]
    if unknown := [name for name in names if name not in there]:
        raise UsageError(f"--phase {unknown[0]}: the plan has {', '.join(there)}")
    return {name.partition(".")[0]: name for name in names}


def _plan(
    target: str,
    longest: int,
    batch: int,
    dummy_weights: bool,
    layers: int,
    threads: int | None,
    report: Report,
) -> Plan:
    """TARGET as a plan: loaded, or compiled for `batch` sequences of `longest` tokens."""

    if is_plan(target):
        if layers:
            raise UsageError("--layers cuts a model that is compiled here, not a plan")
        return load_plan(target)
    path = Path(target)
    if path.is_file() and not is_gguf(path) and not dummy_weights:
        raise UsageError(f"{target}: a config.json alone needs --dummy-weights")
    report("compiling", 0, 1)
    plan = compiled(
        target,
        max_context=longest,
        concurrency=batch,
        dummy_weights=dummy_weights,
        layers=layers,
        threads=threads or 0,
    )
    report("compiling", 1, 1)
    return plan


def _print_rows(
    plan: Plan,
    total: int,
    workers: int,
    rows: Sequence[Row],
    predicted: Sequence[dict[str, Any]],
) -> None:
    about = ("model", "size", "params", "kernels", "thr", "test")
    figures: tuple[str, ...] = ("tok/s", "of bound", "outside")
    if any(predicted):
        figures += ("predicted", "error")
    start = (
        f"{plan.model.family} {plan.model.layers}L",
        size(total),
        f"{plan.model.parameters / 1e9:.2f} B",
        " ".join((*(each.format for each in plan.experts[:1]), plan.isa)),
        workers,
    )
    lines = []
    for row, more in zip(rows, predicted, strict=True):
        found = row.record()
        spread = (found["max"] - found["min"]) / 2
        rates = f"{found['tokens_per_second']:.2f} ± {spread:.2f}"
        if "mbu" in found:
            shares: tuple[str, ...] = (f"{found['mbu']:.1%} MBU", f"{found['outside_kernels']:.1%}")
        else:
            shares = (f"{found['peak_share']:.1%} peak", "-")
        if more:
            shares += (f"{more['predicted_tokens_per_second']:.2f}", f"{more['error']:+.1%}")
        lines.append((*start, row.test, rates, *shares))
    right = ("size", "params", "thr", *figures)
    console().print(table("hmc bench", (*about, *figures), lines, numbers=right))


def _print_batches(rows: Sequence[Row]) -> None:
    """What several sequences at once gain over the first number of them, turn by turn."""
    first = rows[0] if rows else None
    for row in rows[1:]:
        assert first is not None
        gain = median(now / then for now, then in zip(row.rates, first.rates, strict=True))
        click.echo(f"{row.test}: {gain:.2f} x the tokens/s of {first.test}")


def _print_ops(row: Row) -> None:
    lines = []
    for op in row.figures["ops"]:
        rate = f"{op['gbps']:.1f}" if "gbps" in op else "-"
        took, share = f"{op['microseconds']:.1f}", f"{op['share']:.1%}"
        lines.append((op["op"], op["steps"], took, share, rate))
    columns = ("op", "steps", "us a token", "share", "GB/s")
    console().print(table(f"Time of a step, {row.test}", columns, lines, numbers=columns[1:]))


def _formats(plan: Plan) -> str:
    """Storage formats of all matrices, those with most bytes first: `fp8+bf16`."""
    by_bytes: dict[str, int] = {}
    for weight in plan.weights:
        if len(weight.shape) > 1:
            by_bytes[weight.format] = by_bytes.get(weight.format, 0) + weight.bytes
    for each in plan.experts:
        by_bytes[each.format] = by_bytes.get(each.format, 0) + each.bytes * each.count
    return "+".join(sorted(by_bytes, key=lambda name: -by_bytes[name]))
