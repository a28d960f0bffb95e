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
from typing import ClassVar

from hmc.plan import Phase, Plan
from hmc.plan.phases import decode_phase, prefill_phase
from hmc.predict.cost import Call, CostModel
from hmc.predict.timeline import host_prefill
from hmc.report.timeline import family_of
from hmc.report.words import Tick, number, si

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1200, 440, 92, 1184, 12, 392
"""The drawing, and the edges of what lies between its axes."""
_LABEL_WIDTH, _LABEL_HEIGHT, _LEAST = 6.8, 14, 0.02


@dataclass
class Point:
    """One op of a phase on a resource, with weights of one format ("": without weights); `share` of
    the phase's busy time on that resource. And its mark: where it is, and what it says."""

    phase: Phase
    resource: str
    op: str
    form: str
    decode: bool
    bytes: float = 0.0
    flops: float = 0.0
    seconds: float = 0.0
    share: float = 0.0
    x: float = 0.0
    y: float = 0.0
    speed: str = "not known"
    title: str = ""

    @property
    def name(self) -> str:
        """Op and format."""
        return f"{self.op} {self.form}".strip()

    @property
    def intensity(self) -> float:
        """FLOPs a byte."""
        return self.flops / self.bytes

    @property
    def radius(self) -> float:
        """Its area grows with its share."""
        return 4 + 9 * math.sqrt(self.share)

    @property
    def family(self) -> int:
        """Its colour."""
        return family_of(self.op)


@dataclass(frozen=True)
class Label:
    """A point's name where it covers nothing."""

    x: float
    y: float
    text: str
    anchor: str


@dataclass(frozen=True)
class Roofline:
    """The chart; `timed` says whether the vertical axis is FLOP/s. A roof is a limit as (path,
    label): the slanted part is memory, the flat part arithmetic."""

    timed: bool
    points: tuple[Point, ...]
    labels: tuple[Label, ...]
    roofs: tuple[tuple[str, str], ...]
    columns: tuple[Tick, ...]
    rows: tuple[Tick, ...]
    width: ClassVar[int] = WIDTH
    height: ClassVar[int] = HEIGHT
    left: ClassVar[int] = LEFT
    right: ClassVar[int] = RIGHT
    top: ClassVar[int] = TOP
    bottom: ClassVar[int] = BOTTOM


def roofline(plan: Plan, model: CostModel | None, context: int, prompt: int) -> Roofline:
    """Decode of one sequence behind `context` tokens, and prefill of `prompt` tokens."""
    decode = plan.phase(decode_phase(plan, 1))
    prefill = plan.phase(prefill_phase(plan, prompt))
    last = host_prefill(prefill, prompt)[-1] if model else Call(min(prompt, prefill.max_tokens))
    points = _points(plan, decode, Call(1, context), model, decode=True)
    points += _points(plan, prefill, last, model, decode=False)
    limits = list(_limits(plan, model)) if model else []
    heights = [point.flops / point.seconds if model else point.flops for point in points]
    xs = [point.intensity for point in points] + [peak / memory for _, memory, peak in limits]
    across = _Log(xs, LEFT, RIGHT)
    up = _Log(heights + [peak for _, _, peak in limits], BOTTOM, TOP)
    for point, height in zip(points, heights, strict=True):
        point.x, point.y = across(point.intensity), up(height)
        if model:
            point.speed = si(height, "FLOP/s")
        point.title = (
            f"{point.name} on {point.resource} in {point.phase.name}: {si(point.flops, 'FLOP')},"
            f" {si(point.bytes, 'B')}, {point.intensity:.3g} FLOP/B, {point.share:.0%} of the"
            f" {'time' if model else 'weight bytes'}"
        )
    return Roofline(
        model is not None,
        tuple(sorted(points, key=lambda point: -point.radius)),
        tuple(_labels(points)),
        tuple(_roof(*limit, across, up) for limit in limits),
        tuple(Tick(across(each), number(each)) for each in across.decades),
        tuple(Tick(up(each), si(each, "FLOP/s" if model else "FLOP")) for each in up.decades),
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


def _points(
    plan: Plan, phase: Phase, call: Call, model: CostModel | None, *, decode: bool
) -> list[Point]:
    """Without a cost model weights alone, read once a call: their bytes stand for the time."""
    forms = {weight.name: weight.format for weight in plan.weights}
    forms |= {f"layer:{experts.layer}": experts.format for experts in plan.experts}
    points: dict[tuple[str, str, str], Point] = {}
    busy: dict[str, float] = defaultdict(float)
    for step in phase.steps:
        flops, moved = float(step.flops * call.tokens), float(step.weight_bytes)
        seconds = moved
        if model:
            cost = model.step(phase, step, call)
            flops, moved = sum(cost.flops.values()), sum(cost.bytes.values())
            seconds = cost.seconds
        busy[step.resource] += seconds
        if flops and moved and step.resource.startswith(("cpu", "gpu")):
            key = step.resource, step.op, next((forms[n] for n in step.weights.values()), "")
            found = points.setdefault(key, Point(phase, *key, decode))
            found.flops += flops
            found.bytes += moved
            found.seconds += seconds
    for point in points.values():
        point.share = point.seconds / busy[point.resource]
    return list(points.values())


def _limits(plan: Plan, model: CostModel) -> Iterator[tuple[str, float, float]]:
    """(name, bytes/s, FLOP/s) of each kind of device."""
    rates = model.machine.known_rates
    yield "CPU", rates.read_all, rates.dot.value
    used = {step.resource for phase in plan.phases for step in phase.steps}
    for index, gpu in enumerate(model.machine.gpus):
        if gpu.rates is not None and f"gpu{index}" in used:
            yield f"GPU {index}, BF16", gpu.rates.memory.value, gpu.rates.bf16.value
            if gpu.rates.fp8 is not None:
                yield f"GPU {index}, FP8", gpu.rates.memory.value, gpu.rates.fp8.value
            return  # further GPUs of a machine are alike


def _labels(points: Sequence[Point]) -> Iterator[Label]:
    """Names of the points that take longest, beside, above or below them: the first place that
    covers no other label and no mark; a name that finds none is left to the table."""
    large = sorted((p for p in points if p.share >= _LEAST), key=lambda each: -each.share)
    taken = [(p.x - p.radius, p.y - p.radius, p.x + p.radius, p.y + p.radius) for p in large]
    for point in large:
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
            inside = box[0] >= LEFT and box[2] <= RIGHT and box[1] >= TOP
            if inside and box[3] < BOTTOM and not any(_cross(box, b) for b in taken):
                taken.append(box)
                yield Label(x, y, text, anchor)
                break


def _cross(a: tuple[float, ...], b: tuple[float, ...]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _roof(name: str, memory: float, peak: float, across: _Log, up: _Log) -> tuple[str, str]:
    low, high = across.ends
    start = max(low, up.ends[0] / memory)
    path = (
        f"M{across(start):.1f} {up(start * memory):.1f} L{across(peak / memory):.1f} {up(peak):.1f}"
        f" L{across(high):.1f} {up(peak):.1f}"
    )
    return path, f"{name}: {si(memory, 'B/s')}, {si(peak, 'FLOP/s')}"
