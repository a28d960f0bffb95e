"""`hmc bench kernels`: rates of single kernels beside their references."""

from __future__ import annotations

import click

from hmc.cli.arguments import (
    POSITIVE,
    THREADS,
    Several,
    Shape,
    circumstances,
    count,
    option,
    positive,
)
from hmc.cli.output import JSON, console, print_json, progress, table
from hmc.errors import UsageError

_SHAPES = "2048x7168,7168x2048,768x2048,2048x768"
_EXPERT_SHAPES = "768x2048,2048x7168"
_STATE_SHAPES = "4096x128"
_FORMATS = "fp8,bf16,int4"


@click.command(
    "kernels", short_help="Rates of single kernels from memory, from L2 or against peak."
)
@option(
    "--op",
    type=click.Choice(
        "linear experts linear_attention gemm grouped linear_attention_prefill".split()
    ),
    default="linear",
    help="GEMV and small batches, the expert MLP, or states of linear attention (against the"
    " streaming read); prefill's matmul, its experts, or its linear attention (against the"
    " multiply-add peak).",
)
@option(
    "--format",
    "formats",
    type=Several(click.STRING),
    metavar="F,..",
    help=f"Weights [default: {_FORMATS}; states are f32].",
)
@option(
    "--shape",
    "shapes",
    type=Several(Shape()),
    metavar="ROWSxK,..",
    help="Output rows x K; experts: intermediate x hidden; linear attention: rows of all heads of"
    f" KxK x K [default: {_SHAPES}; experts: {_EXPERT_SHAPES}; linear attention:"
    f" {_STATE_SHAPES}].",
)
@option(
    "--tokens",
    type=Several(POSITIVE),
    metavar="T,..",
    help="Tokens a call [default: 1,2,4,8; for prefill: 512].",
)
@option("--group", default=128, metavar="G", help="Columns that share a scale, where groups do.")
@option("--top-k", default=8, metavar="K", help="Experts a token, for the expert ops.")
@option("--l2", is_flag=True, help="From the L2 of one core instead: rows are cut to fit half.")
@option(
    "--no-barriers",
    is_flag=True,
    help="Let linear matrices follow each other without waiting: shows what barriers cost.",
)
@option("--isa", metavar="TIER", help="Kernel tier [default: the best this machine has].")
@positive("--repetitions", default=9, metavar="R")
@THREADS
@count(
    "--megabytes",
    help="Weights to go through in a pass, and memory of the streaming read [default: 640];"
    " small values are for tests: they stay in cache.",
)
@JSON
def kernels(
    op: str,
    formats: list[str] | None,
    shapes: list[tuple[int, int]] | None,
    tokens: list[int] | None,
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
    page size, streams, order) over the very bytes the kernel reads; of prefill kernels,
    multiply-adds between registers. Ratios are medians of neighbouring passes.

    \b
    hmc bench kernels --format fp8 --shape 2048x7168 --tokens 1,2,4,8
    hmc bench kernels --op experts --format int4 --group 32
    hmc bench kernels --l2 --format fp8 --shape 768x2048 --tokens 1
    hmc bench kernels --op grouped --format fp8 --tokens 512,2048
    """
    if l2 and threads not in (None, 1):
        raise UsageError("--l2 measures one core: leave --threads out")
    from hmc.bench.cases import OPS, Case
    from hmc.bench.kernels import DEFAULT_MEGABYTES, KernelBench
    from hmc.codegen.isa import TIERS, best_isa, require

    if isa is not None and isa not in TIERS:
        raise UsageError(f"--isa {isa}: no such kernel tier; choose from {', '.join(TIERS)}")
    tier = best_isa() if isa is None else require(isa)
    kind = OPS[op]
    usual = _EXPERT_SHAPES if kind.routed else _STATE_SHAPES if kind.kept else _SHAPES
    cases = [  # those that share their weights next to each other
        Case(op, form, rows, k, count, group, top_k)
        for form in formats or (["f32"] if kind.kept else _FORMATS.split(","))
        for rows, k in shapes or Several(Shape())(usual)
        for count in tokens or ([512] if kind.many else [1, 2, 4, 8])
    ]
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
                "reference": "multiply-add peak" if kind.many else str(reference or "read from L2"),
                **circumstances(tier.name, bench.pool.workers),
            }
        )
        return
    unit = "gflops" if kind.many else "gbps"
    name = "GFLOP/s" if kind.many else "GB/s"
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
