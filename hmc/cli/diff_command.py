"""`hmc diff`: what two plans differ in; exits with 0 when they are equal, 1 when not."""

from __future__ import annotations

from collections.abc import Mapping

import click
from rich.console import Console

from hmc.cli.output import JSON, console, print_json, records, size, table
from hmc.plan import Plan, load_plan
from hmc.plan.changes import ABSENT, PlanDiff
from hmc.plan.diff import diff

_MANY = 40


@click.command("diff")
@click.argument("first", metavar="A")
@click.argument("second", metavar="B")
@click.option(
    "--all", "everything", is_flag=True, help=f"Also what goes beyond {_MANY} rows a table."
)
@JSON
def command(first: str, second: str, everything: bool, as_json: bool) -> int:
    """Show what the plans A and B differ in: model, machine and limits, placement, memory, kernels,
    schedules, predictions, decisions.

    Like diff, exits with 0 when the plans are equal, with 1 when they differ, and with 5 when one
    cannot be read.
    """
    a, b = load_plan(first), load_plan(second)
    found = diff(a, b)
    predictions = [] if found.equal else _predictions(a, b)
    if as_json:
        keys = ("what", "unit", "before", "after", "reason")
        listed = records(keys, predictions)
        print_json({"a": first, "b": second, **found.as_json(), "predictions": listed})
    elif found.equal:
        click.echo("the plans are equal")
    else:
        _show(found, predictions, None if everything else _MANY)
    return 0 if found.equal else 1


Predicted = tuple[str, str, float | None, float | None, str]
"""What, unit, before, after, and why a side has no figure."""


def _predictions(a: Plan, b: Plan) -> list[Predicted]:
    """Predicted figures of both for the loads that both can take."""
    from hmc.predict.loads import common_loads, predictions

    loads = common_loads((a, b))
    found = []
    for one, two in zip(*(predictions(plan, loads) for plan in (a, b)), strict=True):
        what, reason = one.load.what, one.reason or two.reason
        if one.load.kind == "prefill":
            first = f"{what}: time to first token"
            found.append((first, "s", one.seconds, two.seconds, reason))
        found.append((what, "tokens/s", one.rate, two.rate, reason))
    return found


def _show(found: PlanDiff, predictions: list[Predicted], limit: int | None) -> None:
    out = console()

    def show(
        title: str, columns: tuple[str, ...], rows: list[tuple[object, ...]], numbers: str = ""
    ) -> None:
        if rows:
            out.print(table(title, columns, rows[:limit], numbers=numbers.split()))
            _rest(out, len(rows), limit)

    columns = ("", "before", "after")
    show("Facts", columns, [(each.what, each.before, each.after) for each in found.facts])
    moved = [
        (m.layers, m.before, m.after, m.experts, m.count or "", size(m.bytes) if m.bytes else "")
        for m in found.placement
    ]
    show(
        "Placement",
        ("layers", "before", "after", "experts", "count", "bytes"),
        [(*row,) for row in moved],
        "count bytes",
    )
    show(
        "Memory",
        ("device", "kind", "before", "after", "delta", "detail"),
        [
            (c.device, c.kind, size(c.before), size(c.after), _signed(c.delta), c.detail)
            for c in found.ledger
        ],
        "before after delta",
    )
    show("Kernels", ("kernel", "", "detail"), [(k.name, k.status, k.detail) for k in found.kernels])
    show("Weights", ("weight", "", "detail"), [(w.name, w.status, w.detail) for w in found.weights])
    show(
        "Phases",
        ("phase", "", "steps", "added", "removed", "changed", "differing fields"),
        [
            (
                phase.phase,
                phase.status,
                f"{phase.steps_before} -> {phase.steps_after}",
                _counts(phase.added),
                _counts(phase.removed),
                _counts(phase.changed),
                _counts(phase.fields),
            )
            for phase in found.phases
        ],
    )
    show(
        "In phases",
        columns,
        [
            (f"{phase.phase} {each.what}", each.before, each.after)
            for phase in found.phases
            for each in phase.facts
        ],
    )
    show(
        "Predictions",
        ("", "before", "after", "change"),
        [
            (f"{what}, {unit}", _figure(before), _figure(after), _ratio(before, after) or reason)
            for what, unit, before, after, reason in predictions
        ],
        "before after",
    )
    show(
        "Decisions",
        ("by", "subject", "before", "after", "reason"),
        [(d.by, d.subject, d.before, d.after, d.reason) for d in found.decisions],
    )


def _rest(out: Console, count: int, limit: int | None) -> None:
    if limit is not None and count > limit:
        out.print(f"... and {count - limit} more (--all)\n")


def _signed(count: int) -> str:
    return ("+" if count > 0 else "") + size(count)


def _counts(found: Mapping[str, int]) -> str:
    """`12 linear, 3 norm`."""
    return ", ".join(f"{count} {op}" for op, count in found.items()) or ABSENT


def _figure(value: float | None) -> str:
    return ABSENT if value is None else f"{value:.4g}"


def _ratio(before: float | None, after: float | None) -> str:
    if before is None or after is None:
        return ""
    return "the same" if before == after else f"{after / before - 1:+.1%}"
