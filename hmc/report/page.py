"""A plan as one HTML page without any external resource: gathers what the charts and tables need
and puts it into templates/. Hides the templates.

What cannot be known is left out with a sentence that says why: timelines and predictions of a
machine without rates, measurements that nobody took.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from hmc.errors import HmcError
from hmc.plan import Plan
from hmc.predict.cost import CostModel
from hmc.predict.loads import Predicted, common_loads, predictions
from hmc.predict.measured import Measured
from hmc.report.heatmap import heat_map
from hmc.report.roofline import roofline
from hmc.report.timeline import FAMILIES, Drawing, decode_drawing, prefill_drawing
from hmc.report.words import facts, number, si
from hmc.version import VERSION

_TEMPLATES = Path(__file__).parent / "templates"
_CONTEXT, _PROMPT = 4096, 32_768


def render(plan: Plan, name: str, measured: Sequence[Measured] = ()) -> str:
    """The page of a plan; `name` is what it is called, `measured` what was measured with it."""
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"si": si, "number": number}
    prompt = min(_PROMPT, plan.limits.max_context)
    context = min(_CONTEXT, plan.limits.max_context - 1)
    model: CostModel | None = None
    drawings: list[Drawing] = []
    unknown = ""
    try:
        model = CostModel(plan)
        drawings = [decode_drawing(plan, model, context), prefill_drawing(plan, model, prompt)]
    except HmcError as error:
        model, unknown = None, str(error)
    figures = predictions(plan, common_loads([plan]))
    return environment.get_template("report.html.j2").render(
        plan=plan,
        name=name,
        version=VERSION,
        style=(_TEMPLATES / "style.css").read_text(),
        facts=facts(plan),
        tiles=_tiles(figures, plan),
        heat=heat_map(plan),
        drawings=drawings,
        unknown=unknown,
        families=list(FAMILIES),
        colours=_colours(plan),
        roof=roofline(plan, model, context, prompt),
        roof_loads=(context, prompt),
        compared=_compared(plan, figures, measured),
        anything_measured=bool(measured),
        kernels=_kernel_rows(plan),
    )


_KIND_FAMILIES = {
    "attention": "attention",
    "routed experts": "experts",
    "shared experts and dense MLPs": "dense matmuls",
    "routers": "routing",
    "norms and router biases": "norms and sums",
    "streaming": "transfers",
}
"""Kinds of memory that are for one family of ops, and have its colour."""
_OTHER_COLOURS = 7


def _colours(plan: Plan) -> dict[str, str]:
    """The style of each kind of memory: its family's, else one that means nothing else."""
    kinds = dict.fromkeys(item.kind for item in plan.ledger)
    others = [kind for kind in kinds if kind not in _KIND_FAMILIES]
    found = {kind: f"k{number % _OTHER_COLOURS}" for number, kind in enumerate(others)}
    for kind in kinds.keys() & _KIND_FAMILIES.keys():
        family = next(n for n, each in enumerate(FAMILIES) if each == _KIND_FAMILIES[kind])
        found[kind] = f"f{family}"
    return found


def _tiles(figures: Sequence[Predicted], plan: Plan) -> list[tuple[str, str, str]]:
    """(value, unit, what) of the figures people look for first."""
    found: list[tuple[str, str, str]] = []
    decode = [f for f in figures if f.load.kind == "decode" and f.load.batch == 1]
    first = [f for f in figures if f.load.kind == "prefill"]
    for figure in decode[-1:]:
        if figure.rate is not None:
            found.append((number(figure.rate), "tokens/s", f"{figure.load.what} (predicted)"))
    for figure in (*first[:1], *first[1:][-1:]):
        if figure.seconds is not None:
            value, _, unit = si(figure.seconds, "s").partition(" ")
            what = f"to the first token of {figure.load.tokens} (predicted)"
            found.append((value, unit, what))
    for device, total in plan.ledger_totals.items():
        value, _, unit = si(total, "B").partition(" ")
        found.append((value, unit, f"on {device}, of {si(plan.machine.memory_of(device), 'B')}"))
    return found


def _compared(
    plan: Plan, figures: Sequence[Predicted], measured: Sequence[Measured]
) -> list[tuple[Predicted, Measured | None]]:
    """Measured loads with the prediction for the very same load, then the ordinary loads."""
    context = plan.limits.max_context
    own = [row for row in measured if row.tokens <= context and row.batch <= plan.limits.max_batch]
    loads = [row.load for row in own]
    ordinary = [(figure, None) for figure in figures if figure.load not in loads]
    return [*zip(predictions(plan, loads), own, strict=True), *ordinary]


def _kernel_rows(plan: Plan) -> list[tuple[str, str, list[int]]]:
    """(key, tile, steps in each phase) of every kernel, PyTorch's functions included."""
    uses = Counter((p.name, key) for p in plan.phases for s in p.steps for key in s.kernels)
    keys = dict.fromkeys([*plan.kernels, *(key for _, key in uses)])
    return [
        (
            key,
            " ".join(f"{n}={v}" for n, v in plan.kernels[key].tile) if key in plan.kernels else "",
            [uses[phase.name, key] for phase in plan.phases],
        )
        for key in keys
    ]
