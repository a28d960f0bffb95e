"""`hmc bench`: a plan or a model shape, or with `kernels` as first argument single kernels."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from hmc.cli.output import JSON, Report, console, print_json, progress, size, table
from hmc.errors import UsageError
from hmc.version import VERSION

if TYPE_CHECKING:
    from hmc.bench.model import DecodeRow, PromptRow
    from hmc.plan import Plan

_SHAPES = "2048x7168,7168x2048,768x2048,2048x768"
_EXPERT_SHAPES = "768x2048,2048x7168"

_THREADS = click.option(
    "--threads", type=int, metavar="N", help="Native workers [default: the plan's, or one a core]."
)


class _Bench(click.Command):
    """Measures a TARGET, unless the first argument names a sub-benchmark."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        line = shlex.join(["hmc", str(info_name), *args])
        if args and args[0] in _SUB_BENCHMARKS:
            sub = _SUB_BENCHMARKS[args[0]]
            context = sub.make_context(f"{info_name} {args[0]}", args[1:], parent, **extra)
        else:
            context = super().make_context(info_name, args, parent, **extra)
        context.meta["hmc.bench.command"] = line
        return context

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        super().format_options(ctx, formatter)
        with formatter.section("Sub-benchmarks (as first argument; each has its own --help)"):
            formatter.write_dl([(n, c.get_short_help_str(80)) for n, c in _SUB_BENCHMARKS.items()])

    def collect_usage_pieces(self, ctx: click.Context) -> list[str]:
        return ["TARGET [OPTIONS]"]


@click.command("bench", cls=_Bench)
@click.argument("target", metavar="TARGET")
@click.option(
    "-p", "--prompts", default="512", show_default=True, metavar="N,..", help="Prompt lengths; 0: none."
)
@click.option(
    "-n", "--tokens", default=64, show_default=True, metavar="N", help="Tokens to decode; 0: none."
)
@click.option(
    "--context", default=0, show_default=True, metavar="N", help="Tokens in the cache before decoding."
)
@click.option(
    "--dummy-weights", is_flag=True, help="Random weights of the real shapes: config.json is enough."
)
@click.option(
    "--layers", default=0, metavar="N", help="With --dummy-weights: cut the depth to N layers."
)
@click.option("--repetitions", default=5, show_default=True, metavar="R")
@_THREADS
@click.option(
    "--home",
    type=click.Choice(["mapped", "arena"]),
    default="mapped",
    show_default=True,
    help="Weights in the page cache, or copied to huge pages.",
)
@click.option("--checkpoint", metavar="DIR", help="Model directory of a plan, if it has moved.")
@click.option("--by-op", is_flag=True, help="Also show which ops the time of a decode step goes to.")
@click.option(
    "--megabytes",
    default=0,
    metavar="N",
    help="Memory the streaming read goes through [default: 1 GiB or 8 x the last-level cache];"
    " small values are for tests: they stay in cache.",
)
@JSON
@click.pass_context
def command(
    ctx: click.Context,
    target: str,
    prompts: str,
    tokens: int,
    context: int,
    dummy_weights: bool,
    layers: int,
    repetitions: int,
    threads: int | None,
    home: str,
    checkpoint: str | None,
    by_op: bool,
    megabytes: int,
    as_json: bool,
) -> None:
    """Measure prefill and decode of TARGET: a plan (.hmp), a model directory, or a config.json.

    A directory or config.json is compiled in memory. Prints tokens a second (median, least and
    most of the repetitions) and what they are worth: for decode the MBU, which is the weight bytes
    of a step over its time and over the best streaming read of the same minutes, and the share of
    the step outside kernels; for prefill the share of the register-only multiply-add peak.

    \b
    hmc bench plan.hmp -p 512,2048 -n 64
    hmc bench config.json --dummy-weights --layers 8
    hmc bench kernels --format fp8 --shape 2048x7168 --tokens 1,4
    """
    lengths = [length for length in _numbers("-p", prompts, least=0) if length]
    _at_least("-n", tokens, 0)
    _at_least("--context", context, 0)
    _at_least("--repetitions", repetitions, 1)
    _at_least("--megabytes", megabytes, 0)
    if threads is not None:
        _at_least("--threads", threads, 1)
    if dummy_weights and home == "arena":
        raise UsageError("--home arena: dummy weights are in huge pages always")
    with progress() as report:
        longest = max((*lengths, context + tokens))
        plan = _plan(target, longest, dummy_weights, layers, threads)
        from hmc.bench.model import ModelBench, active_bytes, check_tests, total_bytes
        from hmc.runtime.executor import Executor

        check_tests(plan, lengths, tokens, context)
        executor = Executor(
            plan,
            Path(checkpoint or plan.checkpoint.path),
            threads=threads,
            dummy_weights=dummy_weights,
            home=home,  # type: ignore[arg-type]
            progress=report,
        )
        try:
            bench = ModelBench(
                executor, repetitions=repetitions, megabytes=megabytes, report=report
            )
            prompt_rows = [bench.prompt(length) for length in lengths]
            decode_row = bench.decode(tokens, context) if tokens else None
            workers, kernels = executor.pool.workers, executor.kernels_used
        finally:
            executor.close()
    rows = [*prompt_rows, *([decode_row] if decode_row else [])]
    reference = _reference(bench.memory.sweep.bytes_per_second, decode_row)
    model = plan.model
    facts = {
        "model": f"{model.architecture}, {model.layers} layers",
        "bytes": total_bytes(plan),
        "active_bytes": active_bytes(plan),
        "parameters": model.parameters,
        "active_parameters": model.active_parameters,
        "weights": "dummy" if dummy_weights else home,
        "formats": _formats(plan),
    }
    if as_json:
        print_json(
            {
                "rows": [row.record() for row in rows],
                "reference_gbps": round(reference / 1e9, 3),
                "reference": str(bench.memory.variant),
                **facts,
                **_circumstances(ctx, plan.isa, workers),
                "kernels": list(kernels),
            }
        )
        return
    _print_rows(plan, facts, workers, rows)
    click.echo(
        f"streaming read {reference / 1e9:.1f} GB/s ({bench.memory.variant}; best of"
        f" {len(bench.memory.sweep.rates)} ways); a decode step reads {size(active_bytes(plan))}"
    )
    if by_op and decode_row is not None:
        _print_ops(decode_row)


def _reference(sweep: float, decode: DecodeRow | None) -> float:
    """The streaming read in bytes/s: as timed between decode repetitions, else as the sweep had it."""
    return sweep if decode is None else decode.compared.reference


def _plan(target: str, longest: int, dummy_weights: bool, layers: int, threads: int | None) -> Plan:
    """TARGET as a plan: loaded, or compiled for a context of `longest` tokens."""
    from hmc.plan import Plan

    path = Path(target)
    if not path.exists():
        raise UsageError(
            f"{target}: no such file or directory; give a plan, a model directory or a config.json"
        )
    if path.is_file() and path.suffix != ".json":
        if layers:
            raise UsageError("--layers cuts a model that is compiled here, not a plan")
        return Plan.load(path)
    if path.is_file() and not dummy_weights:
        raise UsageError(f"{target}: a config.json alone needs --dummy-weights")
    from hmc.compiler import compile as compile_plan

    return compile_plan(
        path,
        max_context=longest,
        dummy_weights=dummy_weights,
        layers=layers,
        threads=threads or 0,
    )


def _print_rows(
    plan: Plan, facts: dict[str, Any], workers: int, rows: Sequence[PromptRow | DecodeRow]
) -> None:
    columns = ("model", "size", "params", "formats", "isa", "threads", "test", "tok/s")
    columns += ("min - max", "MBU", "outside kernels", "of peak")
    start = (
        facts["model"],
        size(facts["bytes"]),
        f"{facts['parameters'] / 1e9:.2f} B",
        facts["formats"],
        plan.isa,
        workers,
    )
    lines = []
    for row in rows:
        found = row.record()
        lines.append(
            (
                *start,
                row.test,
                f"{found['tokens_per_second']:.2f}",
                f"{found['min']:.2f} - {found['max']:.2f}",
                _percent(found.get("mbu")),
                _percent(found.get("outside_kernels")),
                _percent(found.get("peak_share")),
            )
        )
    numbers = ("threads", *columns[7:])
    console().print(table("hmc bench", columns, lines, numbers=numbers))


def _print_ops(row: DecodeRow) -> None:
    lines = []
    for each in row.ops:
        found = each.record()
        rate = f"{found['gbps']:.1f}" if "gbps" in found else "-"
        lines.append((each.op, each.steps, f"{found['microseconds']:.1f}", f"{each.share:.1%}", rate))
    columns = ("op", "steps", "us a token", "share", "GB/s")
    console().print(table(f"Time of a step, {row.test}", columns, lines, numbers=columns[1:]))


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.1%}"


def _formats(plan: Plan) -> str:
    """Storage formats of the experts and of the decode matmuls besides them, as `fp8` or `fp8+bf16`."""
    by_bytes: dict[str, int] = {}
    for weight in plan.weights:
        if len(weight.shape) > 1:
            by_bytes[weight.format] = by_bytes.get(weight.format, 0) + weight.bytes
    for each in plan.experts:
        by_bytes[each.format] = by_bytes.get(each.format, 0) + each.bytes * each.count
    return "+".join(sorted(by_bytes, key=lambda name: -by_bytes[name]))


@click.command("kernels", short_help="Rates of single kernels from memory, from L2 or against peak.")
@click.option(
    "--op",
    type=click.Choice(["linear", "experts", "gemm", "grouped"]),
    default="linear",
    show_default=True,
    help="GEMV and small batches, or the expert MLP (against the streaming read); prefill's matmul,"
    " or its experts (against the multiply-add peak).",
)
@click.option(
    "--format", "formats", default="fp8,bf16,int4", show_default=True, metavar="F,..", help="Weights."
)
@click.option(
    "--shape",
    "shapes",
    metavar="ROWSxK,..",
    help="Output rows x K; experts: intermediate x hidden"
    f" [default: {_SHAPES}; experts: {_EXPERT_SHAPES}].",
)
@click.option(
    "--tokens", metavar="T,..", help="Tokens a call [default: 1,2,4,8; gemm and grouped: 512]."
)
@click.option("--group", default=128, show_default=True, metavar="G", help="Group size of int4.")
@click.option(
    "--top-k", default=8, show_default=True, metavar="K", help="Experts a token, for the expert ops."
)
@click.option("--l2", is_flag=True, help="From the L2 of one core instead: rows are cut to fit half.")
@click.option(
    "--no-barriers",
    is_flag=True,
    help="Let linear matrices follow each other without waiting: shows what barriers cost.",
)
@click.option("--isa", metavar="TIER", help="Kernel tier [default: the best this machine has].")
@click.option("--repetitions", default=9, show_default=True, metavar="R")
@_THREADS
@click.option(
    "--megabytes",
    default=0,
    metavar="N",
    help="Weights to go through in a pass, and memory of the streaming read [default: 640];"
    " small values are for tests: they stay in cache.",
)
@JSON
@click.pass_context
def kernels(
    ctx: click.Context,
    op: str,
    formats: str,
    shapes: str | None,
    tokens: str | None,
    group: int,
    top_k: int,
    l2: bool,
    no_barriers: bool,
    isa: str | None,
    repetitions: int,
    threads: int | None,
    megabytes: int,
    as_json: bool,
) -> None:
    """Measure single kernels, each pass between two passes of its reference.

    The reference of decode kernels is the fastest streaming read of a sweep (prefetch distance,
    page size, streams, order) over the very bytes the kernel reads; of prefill kernels, multiply-adds
    between registers. Ratios are medians of neighbouring passes.

    \b
    hmc bench kernels --format fp8 --shape 2048x7168 --tokens 1,2,4,8
    hmc bench kernels --op experts --format int4 --group 32
    hmc bench kernels --l2 --format fp8 --shape 768x2048 --tokens 1
    hmc bench kernels --op grouped --format fp8 --tokens 512,2048
    """
    experts, prefill = op in ("experts", "grouped"), op in ("gemm", "grouped")
    _at_least("--repetitions", repetitions, 1)
    _at_least("--megabytes", megabytes, 0)
    if threads is not None:
        _at_least("--threads", threads, 1)
        if l2 and threads != 1:
            raise UsageError("--l2 measures one core: leave --threads out")
    from hmc.bench.kernels import DEFAULT_MEGABYTES, KernelBench, cases_of
    from hmc.codegen.isa import TIERS, best_isa, require

    if isa is not None and isa not in TIERS:
        raise UsageError(f"--isa {isa}: no such kernel tier; choose from {', '.join(TIERS)}")
    tier = best_isa() if isa is None else require(isa)
    cases = cases_of(
        op,
        _split("--format", formats),
        _shapes(shapes or (_EXPERT_SHAPES if experts else _SHAPES)),
        _numbers("--tokens", tokens or ("512" if prefill else "1,2,4,8"), least=1),
        group=group,
        top_k=top_k,
    )
    with (
        progress() as report,
        KernelBench(tier, threads=threads, l2=l2, barriers=not no_barriers) as bench,
    ):
        rows = bench.measure(
            cases,
            repetitions=repetitions,
            megabytes=megabytes or DEFAULT_MEGABYTES,
            report=report,
        )
    records = [row.record() for row in rows]
    reference = None if bench.reference is None else bench.reference.variant
    if as_json:
        print_json(
            {
                "rows": records,
                "reference": "multiply-add peak" if prefill else str(reference or "read from L2"),
                **_circumstances(ctx, tier.name, bench.pool.workers),
            }
        )
        return
    unit = "gflops" if prefill else "gbps"
    name = "GFLOP/s" if prefill else "GB/s"
    columns = ("op", "format", "shape", "tokens", name, f"reference {name}", "ratio")
    lines = [
        (
            *(found[key] for key in columns[:4]),
            f"{found[unit]:.2f}",
            f"{found[f'reference_{unit}']:.2f}",
            f"{found['ratio']:.3f}",
        )
        for found in records
    ]
    title = f"hmc bench kernels, {tier.name}, {bench.pool.workers} threads"
    console().print(table(title, columns, lines, numbers=columns[3:]))
    if reference is not None:
        click.echo(f"reference: {reference}")


_SUB_BENCHMARKS: dict[str, click.Command] = {"kernels": kernels}


def _circumstances(ctx: click.Context, isa: str, threads: int) -> dict[str, Any]:
    """What a figure needs to be repeated."""
    from hmc.detect import detect

    machine = detect()
    return {
        "machine": f"{machine.cpu}, {machine.cores} cores, {size(machine.memory_bytes)}",
        "isa": isa,
        "threads": threads,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": ctx.meta["hmc.bench.command"],
        "hmc_version": VERSION,
    }


def _split(option: str, text: str) -> list[str]:
    words = [word.strip() for word in text.split(",")]
    if not all(words):
        raise UsageError(f"{option} {text!r}: give values with commas between them")
    return words


def _list(option: str, text: str, read: Callable[[str], Any], form: str) -> list[Any]:
    try:
        return [read(word) for word in _split(option, text)]
    except ValueError:
        raise UsageError(f"{option} {text}: {form}") from None


def _numbers(option: str, text: str, *, least: int) -> list[int]:
    found = _list(option, text, int, "not a list of whole numbers")
    for number in found:
        _at_least(option, number, least)
    return found


def _shapes(text: str) -> list[tuple[int, int]]:
    def read(word: str) -> tuple[int, int]:
        rows, k = (int(part) for part in word.lower().split("x"))
        return rows, k

    return _list("--shape", text, read, "not a list of ROWSxK, such as 2048x7168")


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UsageError(f"{option} {value}: must be at least {least}")
