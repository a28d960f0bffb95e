"""`hmc simulate`: what a plan will do on its machine, or on another one, without running it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from hmc.checkpoint.location import is_gguf
from hmc.cli.arguments import option
from hmc.cli.output import JSON, console, print_json, table
from hmc.cli.planned import compiled, is_plan
from hmc.errors import UsageError
from hmc.plan import Plan, load_plan

if TYPE_CHECKING:
    from hmc.predict.beside import Beside
    from hmc.predict.run import Prediction, Run


@click.command("simulate")
@click.argument("target", required=False)
@click.option(
    "--machine",
    metavar="NAME|FILE",
    help="With a model: the machine to plan for [default: auto]. With a plan: predict its"
    " schedule with this machine's rates.",
)
@option("--prompt", default=512, metavar="N", help="Prompt tokens.")
@option(
    "--context", type=int, metavar="N", help="Context tokens in decode [default: the prompt's]."
)
@option("--batch", type=int, metavar="B", help="Sequences decoding together.")
@option(
    "--concurrency",
    type=int,
    metavar="C",
    help="Users at once: the same as --batch, and for a model"
    " the sequences that the cache must hold.",
)
@option("--max-context", default=0, metavar="N", help="With a model: as in `hmc compile`.")
@option("--vram", default=0.0, metavar="GB", help="With a model: as in `hmc compile`.")
@option("--slo", default="", metavar="GOALS", help="Judge goals such as ttft=30s@32k,tps=20.")
@option(
    "--beside",
    "with_beside",
    is_flag=True,
    help="Also: the prompt streams through the last GPU while the batch decodes (two GPUs).",
)
@option(
    "--data-sheet",
    is_flag=True,
    help="With GPUs that reach the numbers of their data sheets, not those expected of them.",
)
@option("--paper", is_flag=True, help="Print the published test bed's figures beside ours.")
@JSON
def command(
    target: str | None,
    machine: str | None,
    prompt: int,
    context: int | None,
    batch: int | None,
    concurrency: int | None,
    max_context: int,
    vram: float,
    slo: str,
    with_beside: bool,
    data_sheet: bool,
    paper: bool,
    as_json: bool,
) -> None:
    """Predict time to the first token, tokens a second and utilisation for TARGET: a plan, or a
    model: a directory (its config.json is enough), a .gguf file or a hub id, of which no weight is
    fetched.

    The plan's own schedule runs over the machine's resources with durations from the cost model.
    """
    if paper:
        if target is not None:
            raise UsageError("--paper takes no TARGET: it plans for the published test bed")
        _print_paper(as_json, data_sheet)
        return
    if target is None:
        raise UsageError("give a plan or a model (or --paper)")
    if batch is not None and concurrency is not None and batch != concurrency:
        raise UsageError("--batch and --concurrency say the same: give one of them")
    sequences = batch or concurrency or 1
    from hmc.machine.detect import load_machine
    from hmc.predict.beside import beside
    from hmc.predict.goals import parse_goals
    from hmc.predict.run import simulate

    other = None
    if not is_plan(target):
        longest = max(prompt, context or 0)
        plan = compiled(
            target,
            fetch=False,
            machine=machine or "auto",
            max_context=max_context or (longest if longest > 32_768 else 0),
            dummy_weights=not is_gguf(Path(target)),
            concurrency=concurrency or 1,
            vram=vram,
        )
    else:
        plan = load_plan(target)
        other = load_machine(machine) if machine else None
    if data_sheet:
        other = (other or plan.machine).at_peak()
    if slo:
        plan = plan.model_copy(update={"goals": parse_goals(slo, sequences)})
    found = simulate(plan, machine=other, prompt=prompt, context=context, batch=sequences)
    on = (other or plan.machine).name
    load = {"prompt": found.prompt, "context": found.context, "batch": found.batch}
    both = beside(plan, machine=other, **load) if with_beside else None
    if as_json:
        more = {} if both is None else {"beside": both.as_json()}
        head = {"model": plan.model.architecture, "machine": on}
        print_json({**head, **found.as_json(), **more})
        return
    _print(plan, on, found)
    if both is not None:
        _print_beside(both)


def _print(plan: Plan, machine: str, found: Prediction) -> None:
    out = console()
    click.echo(f"{plan.model.architecture} on {machine}, predicted")
    many = found.batch > 1
    facts = [
        ("time to first token", f"{found.ttft:.3f} s", f"prompt of {found.prompt} tokens"),
        ("prefill", f"{found.prefill_rate:.1f} tokens/s", found.prefill.phase),
        (
            "decode",
            f"{found.decode_rate:.2f} tokens/s",
            f"{found.decode.phase}, context {found.context}"
            + (f", {found.batch} sequences together" if many else ""),
        ),
        ("time per token", f"{found.decode.seconds * 1e3:.2f} ms", "of each sequence"),
    ]
    out.print(table("", ("", "", ""), facts))
    names = dict.fromkeys((*found.prefill.utilisation, *found.decode.utilisation))
    busy = [(name, _share(found.prefill, name), _share(found.decode, name)) for name in names]
    columns = ("resource", "busy in prefill", "busy in decode")
    out.print(table("Utilisation", columns, busy, numbers=columns[1:]))
    path = [
        (run.phase, what, f"{seconds * 1e3:.3f} ms")
        for run in (found.prefill, found.decode)
        for what, seconds in run.path[:6]
    ]
    out.print(table("Critical path", ("phase", "step", "time"), path, numbers=("time",)))
    for device in found.too_large:
        click.echo(
            f"the plan does not fit the memory of {device} (`hmc show` has the ledger): these"
            " figures hold only if it did",
            err=True,
        )
    for verdict in found.verdicts:
        word = "met" if verdict.met else "MISSED"
        click.echo(f"goal {verdict.goal}: {word}, {verdict.predicted:.4g} {verdict.unit}")


def _print_beside(both: Beside) -> None:
    rows = [
        (
            what,
            f"{scale * alone:.{digits}f} {unit}",
            f"{scale * together:.{digits}f} {unit}",
            f"{together / alone:.3f} x",
        )
        for what, alone, together, scale, digits, unit in (
            ("time to first token", both.ttft_alone, both.ttft, 1, 3, "s"),
            ("time per token", both.tpot_alone, both.tpot, 1e3, 2, "ms"),
            ("the slowest token", both.tpot_alone, both.tpot_worst, 1e3, 2, "ms"),
        )
    ]
    many = "sequence decodes" if both.batch == 1 else "sequences decode"
    title = f"A prompt of {both.prompt} tokens streams while {both.batch} {many}"
    columns = ("", "alone", "together", "ratio")
    console().print(table(title, columns, rows, numbers=columns[1:]))


def _share(run: Run, name: str) -> str:
    return f"{run.utilisation[name]:.0%}" if name in run.utilisation else "-"


def _print_paper(as_json: bool, data_sheet: bool) -> None:
    from hmc.bench.paper import rows

    found = rows(data_sheet)
    if as_json:
        print_json({"rows": [vars(row) for row in found]})
        return
    cells = [
        (
            row.metric,
            row.what,
            f"{row.published:.4g} {row.unit}",
            f"{row.simulated:.4g} {row.unit}",
            f"{row.error:+.1%}",
            row.kind,
        )
        for row in found
    ]
    columns = ("metric", "what", "published", "simulated", "error", "kind")
    title = "Published figures (arXiv 2606.10493) and ours for the same test bed"
    console().print(table(title, columns, cells, numbers=("published", "simulated", "error")))
