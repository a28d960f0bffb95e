"""Who works when in a call of a phase: the simulator's run of the plan's own steps, drawn twice.

The overview shows the whole call, with neighbours of one family melted together where they are
finer than the drawing; the close-up shows every step of one layer in the middle. Hides how steps
become rectangles.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar, get_args

from hmc.ops import OPS
from hmc.ops.row import Family
from hmc.plan import Plan, Step
from hmc.plan.phases import decode_phase, prefill_phase
from hmc.predict.cost import Call, CostModel
from hmc.predict.run import critical_path
from hmc.predict.timeline import Timeline, host_prefill, run
from hmc.report.words import Tick, si

FAMILIES = get_args(Family)
"""What ops are for; the legend of timelines and roofline, in this order."""

WIDTH, LEFT, TOP, LANE, GAP, AXIS = 1200, 64, 6, 26, 6, 26
_FINEST = 0.6
_THINNEST = 0.9
_LABEL_WIDTH = 6.6


@dataclass(frozen=True)
class Bar:
    """A rectangle; `label` is empty where it does not fit."""

    x: float
    y: float
    width: float
    family: int
    title: str
    label: str = ""


@dataclass(frozen=True)
class Lane:
    """One resource; `busy` is the share of the call it works."""

    name: str
    y: float
    busy: float


@dataclass(frozen=True)
class Chart:
    """Bars on lanes over a time axis."""

    height: float
    lanes: tuple[Lane, ...]
    bars: tuple[Bar, ...]
    marks: tuple[Tick, ...]
    width: ClassVar[int] = WIDTH


@dataclass(frozen=True)
class Drawing:
    """One call: in words, as overview, as close-up of a layer, and what its longest chain is made
    of."""

    name: str
    phase: str
    caption: str
    seconds: str
    overview: Chart
    closeup: Chart
    layer: int
    window: str
    path: tuple[tuple[str, str, float], ...]


def family_of(op: str) -> int:
    """Which of the legend's families an op belongs to."""
    return FAMILIES.index(OPS[op].family)


def decode_drawing(plan: Plan, model: CostModel, context: int) -> Drawing:
    """One decode step of one sequence behind `context` tokens."""
    phase = plan.phase(decode_phase(plan, 1))
    found = run(phase, Call(1, context, 1), model)
    return _draw("Decode step", found, f"one sequence at a context of {context} tokens")


def prefill_drawing(plan: Plan, model: CostModel, tokens: int) -> Drawing:
    """A prompt of `tokens` tokens: all of it, or the last of the chunks it is cut into."""
    phase = plan.phase(prefill_phase(plan, tokens))
    calls = host_prefill(phase, tokens)
    found = run(phase, calls[-1], model)
    which = f", chunk {len(calls)} of {len(calls)}" if len(calls) > 1 else ""
    rates = model.machine.rates
    if phase.slots and rates is not None and rates.prefill is not None:
        which += f" (without the {si(rates.prefill.value, 's')} it takes outside the layers)"
    return _draw("Prefill", found, f"a prompt of {tokens} tokens{which}")


def _draw(name: str, timeline: Timeline, caption: str) -> Drawing:
    phase = timeline.phase
    layers = sorted({step.layer for step in phase.steps if OPS[step.op].routed})
    layers = layers or sorted({step.layer for step in phase.steps if step.layer >= 0})
    middle = layers[len(layers) // 2]
    mine = [
        position
        for position, step in enumerate(phase.steps)
        if step.layer == middle and not OPS[step.op].moves
    ]
    first = min(timeline.start[position] for position in mine)
    last = max(timeline.finish[position] for position in mine)
    total = timeline.result
    path = critical_path(timeline)[:6]
    return Drawing(
        name,
        phase.name,
        caption,
        si(total, "s"),
        _chart(timeline, 0.0, timeline.seconds, melt=True),
        _chart(timeline, first, last, melt=False),
        middle,
        si(last - first, "s"),
        tuple((what, si(seconds, "s"), seconds / total) for what, seconds in path),
    )


def _chart(timeline: Timeline, first: float, last: float, *, melt: bool) -> Chart:
    phase = timeline.phase
    scale = (WIDTH - LEFT) / (last - first)
    resources = sorted(timeline.busy, key=_resource_order)
    lanes = tuple(
        Lane(name, TOP + i * (LANE + GAP), timeline.busy[name] / timeline.seconds)
        for i, name in enumerate(resources)
    )
    bars: list[Bar] = []
    for lane in lanes:
        inside = [
            position
            for position, step in enumerate(phase.steps)
            if step.resource == lane.name
            and timeline.finish[position] > first
            and timeline.start[position] < last
        ]
        for group in _melted(inside, timeline, scale) if melt else [[i] for i in inside]:
            start = max(first, timeline.start[group[0]])
            stop = min(last, timeline.finish[group[-1]])
            steps = [phase.steps[position] for position in group]
            width = (stop - start) * scale
            bars.append(
                Bar(
                    LEFT + (start - first) * scale,
                    lane.y,
                    max(width, _THINNEST),
                    _family(group, timeline),
                    _title(steps, timeline, group),
                    _label(steps, width),
                )
            )
    ticks = _ticks(last - first)
    marks = tuple(Tick(LEFT + each * scale, si(each, "s")) for each in ticks)
    return Chart(TOP + len(lanes) * (LANE + GAP) + AXIS, lanes, tuple(bars), marks)


def _melted(positions: Iterable[int], timeline: Timeline, scale: float) -> list[list[int]]:
    """Neighbours that touch melt when they are of one family or one of them is finer than the
    drawing."""
    groups: list[list[int]] = []
    steps = timeline.phase.steps
    for position in sorted(positions, key=lambda each: timeline.start[each]):
        if groups:
            before = groups[-1]
            gap = timeline.start[position] - timeline.finish[before[-1]]
            length = timeline.finish[before[-1]] - timeline.start[before[0]]
            own = timeline.finish[position] - timeline.start[position]
            same = family_of(steps[before[0]].op) == family_of(steps[position].op)
            if gap * scale < _FINEST and (same or min(length, own) * scale < _FINEST):
                before.append(position)
                continue
        groups.append([position])
    return groups


def _family(group: list[int], timeline: Timeline) -> int:
    """The family that takes most of the group's time."""
    spent: dict[int, float] = defaultdict(float)
    for position in group:
        spent[family_of(timeline.phase.steps[position].op)] += timeline.costs[position].seconds
    return max(spent, key=lambda each: spent[each])


def _title(steps: list[Step], timeline: Timeline, group: list[int]) -> str:
    start, stop = timeline.start[group[0]], timeline.finish[group[-1]]
    when = f"{si(stop - start, 's')} from {si(start, 's')}"
    if len(steps) == 1:
        step, cost = steps[0], timeline.costs[group[0]]
        where = f" of layer {step.layer}" if step.layer >= 0 else ""
        return f"{step.op}{where} on {step.resource}: {when}, bound by {cost.bound}"
    return f"{len(steps)} steps, {steps[0].op} to {steps[-1].op}, on {steps[0].resource}: {when}"


def _label(steps: list[Step], width: float) -> str:
    text = steps[0].op if len(steps) == 1 else ""
    return text if len(text) * _LABEL_WIDTH + 4 <= width else ""


def _resource_order(name: str) -> tuple[int, str]:
    kinds = ("cpu", "gpu", "h2d", "d2h", "link")
    kind = name.rstrip("0123456789")
    return (kinds.index(kind) if kind in kinds else len(kinds), name)


def _ticks(span: float) -> list[float]:
    """Round times, at most nine."""
    step = 10.0**-9
    while span / step > 8:
        step *= 2.5 if str(f"{step:e}")[0] == "2" else 2
    return [index * step for index in range(int(span / step) + 1)]
