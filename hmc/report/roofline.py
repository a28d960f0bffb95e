"""What the plan's kernels reach, and what memory and arithmetic of the machine allow (Williams,
Waterman, Patterson, "Roofline", CACM 52(4), 2009).

Points are ops of a phase on one resource: all their FLOPs over all the bytes they move, at the
simulated speed where the machine's rates are known, else by FLOPs a call.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from hmc.plan import Phase, Plan
from hmc.plan.phases import decode_phase, prefill_phase
from hmc.predict.cost import Call, CostModel
from hmc.predict.timeline import host_prefill
from hmc.report.timeline import family_of
from hmc.report.words import number, si

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1200, 440, 92, 16, 12, 48
_LABEL_WIDTH, _LABEL_HEIGHT, _LEAST = 6.8, 14, 0.02


@dataclass(frozen=True)
class Point:
    """One op of a phase; `share` of the phase's busy time on that resource."""

    x: float
    y: float
    radius: float
    family: int
    decode: bool
    title: str
    name: str
    phase: str
    resource: str
    bytes: str
    flops: str
    intensity: str
    speed: str
    share: float


@dataclass(frozen=True)
class Roof:
    """A limit: the slanted part is memory, the flat part arithmetic."""

    path: str
    label: str
    device: int


@dataclass(frozen=True)
class Label:
    """A point's name where it covers nothing."""

    x: float
    y: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Line:
    """A grid line with its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Roofline:
    """The chart; `timed` says whether the vertical axis is FLOP/s."""

    width: float
    height: float
    left: float
    right: float
    top: float
    bottom: float
    timed: bool
    points: tuple[Point, ...]
    labels: tuple[Label, ...]
    roofs: tuple[Roof, ...]
    columns: tuple[Line, ...]
    rows: tuple[Line, ...]


@dataclass
class _Sum:
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class _Dot:
    phase: Phase
    resource: str
    op: str
    form: str
    total: _Sum
    share: float

    @property
    def intensity(self) -> float:
        return self.total.flops / self.total.bytes


def roofline(plan: Plan, model: CostModel | None, context: int, prompt: int) -> Roofline:
    """Decode of one sequence behind `context` tokens, and prefill of `prompt` tokens."""
    decode = plan.phase(decode_phase(plan, 1))
    prefill = plan.phase(prefill_phase(plan, prompt))
    dots: list[_Dot] = []
    calls = (
        host_prefill(prefill, prompt, model) if model else [Call(min(prompt, prefill.max_tokens))]
    )
    for phase, call in ((decode, Call(1, context)), (prefill, calls[-1])):
        dots += _timed(phase, call, model) if model else _untimed(plan, phase, call)
    limits = list(_limits(plan, model)) if model else []
    xs = [dot.intensity for dot in dots] + [peak / memory for _, memory, peak in limits]
    ys = [_height(dot, model) for dot in dots] + [peak for _, _, peak in limits]
    across = _Log(xs, LEFT, WIDTH - RIGHT)
    up = _Log(ys, HEIGHT - BOTTOM, TOP)
    points = [_point(dot, across, up, model, decode) for dot in dots]
    return Roofline(
        WIDTH,
        HEIGHT,
        LEFT,
        WIDTH - RIGHT,
        TOP,
        HEIGHT - BOTTOM,
        model is not None,
        tuple(sorted(points, key=lambda point: -point.radius)),
        tuple(_labels(points)),
        tuple(_roof(*limit, across, up, index) for index, limit in enumerate(limits)),
        tuple(Line(across(each), number(each)) for each in across.decades),
        tuple(Line(up(each), si(each, "FLOP/s" if model else "FLOP")) for each in up.decades),
    )


class _Log:
    """A logarithmic axis over whole decades around `values`, from one coordinate to another."""

    def __init__(self, values: Sequence[float], start: float, stop: float) -> None:
        self._low = math.floor(math.log10(min(values)))
        self._high = max(self._low + 1, math.ceil(math.log10(max(values)) + 0.05))
        self._start, self._scale = start, (stop - start) / (self._high - self._low)

    def __call__(self, value: float) -> float:
        return self._start + (math.log10(value) - self._low) * self._scale

    @property
    def decades(self) -> list[float]:
        """Powers of ten on the axis."""
        return [10.0**power for power in range(self._low, self._high + 1)]

    @property
    def ends(self) -> tuple[float, float]:
        """The first and the last value."""
        return 10.0**self._low, 10.0**self._high


def _timed(phase: Phase, call: Call, model: CostModel) -> Iterator[_Dot]:
    sums: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    busy: dict[str, float] = defaultdict(float)
    for step in phase.steps:
        cost = model.step(phase, step, call)
        busy[step.resource] += cost.seconds
        flops = sum(cost.flops.values())
        moved = sum(cost.bytes.values())
        if flops and moved and step.resource.startswith(("cpu", "gpu")):
            found = sums[step.resource, step.op, next(iter(cost.flops))]
            found.flops += flops
            found.bytes += moved
            found.seconds += cost.seconds
    for (resource, op, form), total in sums.items():
        yield _Dot(phase, resource, op, form, total, total.seconds / busy[resource])


def _untimed(plan: Plan, phase: Phase, call: Call) -> Iterator[_Dot]:
    """Weights alone, read once a call; the share is that of the bytes."""
    forms = {weight.name: weight.format for weight in plan.weights}
    forms |= {f"layer:{experts.layer}": experts.format for experts in plan.experts}
    sums: dict[tuple[str, str, str], _Sum] = defaultdict(_Sum)
    for step in phase.steps:
        if step.flops and step.weight_bytes:
            form = next((forms[name] for name in step.weights.values()), "f32")
            found = sums[step.resource, step.op, form]
            found.flops += step.flops * call.tokens
            found.bytes += step.weight_bytes
    every = sum(total.bytes for total in sums.values())
    for (resource, op, form), total in sums.items():
        yield _Dot(phase, resource, op, form, total, total.bytes / every)


def _limits(plan: Plan, model: CostModel) -> Iterator[tuple[str, float, float]]:
    """(name, bytes/s, FLOP/s) of each kind of device."""
    rates = model.machine.rates
    assert rates is not None
    yield "CPU", sum(rate.value for rate in rates.read), rates.dot.value
    used = {step.resource for phase in plan.phases for step in phase.steps}
    for index, gpu in enumerate(model.machine.gpus):
        if gpu.rates is not None and f"gpu{index}" in used:
            yield f"GPU {index}, BF16", gpu.rates.memory.value, gpu.rates.bf16.value
            if gpu.rates.fp8.value != gpu.rates.bf16.value:
                yield f"GPU {index}, FP8", gpu.rates.memory.value, gpu.rates.fp8.value
            return  # further GPUs of a machine are alike


def _height(dot: _Dot, model: CostModel | None) -> float:
    return dot.total.flops / dot.total.seconds if model else dot.total.flops


def _point(dot: _Dot, across: _Log, up: _Log, model: CostModel | None, decode: Phase) -> Point:
    height = _height(dot, model)
    name = f"{dot.op} {dot.form}" if dot.form != "f32" else dot.op
    speed = si(height, "FLOP/s") if model else "not known"
    of = "time" if model else "weight bytes"
    title = (
        f"{name} on {dot.resource} in {dot.phase.name}: {si(dot.total.flops, 'FLOP')},"
        f" {si(dot.total.bytes, 'B')}, {dot.intensity:.3g} FLOP/B, {dot.share:.0%} of the {of}"
    )
    return Point(
        across(dot.intensity),
        up(height),
        4 + 9 * math.sqrt(dot.share),
        family_of(dot.op),
        dot.phase is decode,
        title,
        name,
        dot.phase.name,
        dot.resource,
        si(dot.total.bytes, "B"),
        si(dot.total.flops, "FLOP"),
        f"{dot.intensity:.3g}",
        speed,
        dot.share,
    )


def _labels(points: Sequence[Point]) -> Iterator[Label]:
    """Names of the points that take longest, beside, above or below them: the first place that
    covers no other label and no mark; a name that finds none is left to the table."""
    taken = [
        (p.x - p.radius, p.y - p.radius, p.x + p.radius, p.y + p.radius)
        for p in points
        if p.share >= _LEAST
    ]
    for point in sorted(points, key=lambda each: -each.share):
        if point.share < _LEAST:
            return
        text = f"{point.name}, {point.share:.0%}"
        width, off = _LABEL_WIDTH * len(text), point.radius + 5
        spots = [
            (side, down)
            for down in (0, -off - 6, off + 10, -off - 22, off + 26, -off - 38, off + 42)
            for side in ("start", "end")
        ]
        for anchor, down in spots:
            x = point.x + (off if anchor == "start" else -off)
            left = x if anchor == "start" else x - width
            y = point.y + down + 4
            box = (left, y - _LABEL_HEIGHT + 3, left + width, y + 3)
            inside = box[0] >= LEFT and box[2] <= WIDTH - RIGHT and box[1] >= TOP
            if inside and box[3] < HEIGHT - BOTTOM and not any(_cross(box, b) for b in taken):
                taken.append(box)
                yield Label(x, y, text, anchor)
                break


def _cross(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _roof(name: str, memory: float, peak: float, across: _Log, up: _Log, index: int) -> Roof:
    low, high = across.ends
    floor = up.ends[0]
    start = max(low, floor / memory)
    ridge = peak / memory
    path = (
        f"M{across(start):.1f} {up(start * memory):.1f} L{across(ridge):.1f} {up(peak):.1f}"
        f" L{across(high):.1f} {up(peak):.1f}"
    )
    label = f"{name}: {si(memory, 'B/s')}, {si(peak, 'FLOP/s')}"
    return Roof(path, label, index)
