"""Where every routed expert is, as runs of equal cells on a grid of layers and experts."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

from hmc.plan import Plan
from hmc.ranges import expert_intervals
from hmc.report.words import Tick, si

WIDTH, LEFT, TOP, BOTTOM = 1200, 52, 8, 40


@dataclass(frozen=True)
class Cell:
    """A run of experts of one layer in one tier, of a colour."""

    x: float
    y: float
    width: float
    colour: int
    title: str


@dataclass(frozen=True)
class Tier:
    """A tier in the legend."""

    name: str
    colour: int
    experts: int
    share: float
    bytes: str


@dataclass(frozen=True)
class HeatMap:
    """The chart; `row` is the height of one layer, `column` the width of one expert."""

    height: float
    row: float
    column: float
    cells: tuple[Cell, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    tiers: tuple[Tier, ...]
    summary: str
    width: ClassVar[int] = WIDTH


def heat_map(plan: Plan) -> HeatMap | None:
    """The map of a plan; None for a model without routed experts."""
    if not plan.placement:
        return None
    sizes: Counter[int] = Counter()
    for part in plan.experts:
        sizes[part.layer] += part.bytes
    widest = max(part.count for part in plan.experts)
    row = float(max(5, min(18, 520 // len(plan.placement))))
    column = (WIDTH - LEFT) / widest
    names = tier_names(plan)
    cells: list[Cell] = []
    held: Counter[str] = Counter()
    bytes_held: Counter[str] = Counter()
    for number, placement in enumerate(plan.placement):
        for tier, text in placement.tiers.items():
            for first, last in expert_intervals(text):
                count = last - first + 1
                size = count * sizes[placement.layer]
                held[tier] += count
                bytes_held[tier] += size
                which = f"experts {first} to {last}" if count > 1 else f"expert {first}"
                title = f"layer {placement.layer}, {which}: {tier}, {si(size, 'B')}"
                x, y = LEFT + first * column, TOP + number * row
                cells.append(Cell(x, y, count * column, tier_colour(tier), title))
    total = sum(held.values())
    every = math.ceil(13 / row)
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if widest / s <= 16 or s == 128)
    tiers = [
        Tier(n, tier_colour(n), held[n], held[n] / total, si(bytes_held[n], "B")) for n in names
    ]
    shown = list(enumerate(placement.layer for placement in plan.placement))[::every]
    return HeatMap(
        TOP + row * len(plan.placement) + BOTTOM,
        row,
        column,
        tuple(cells),
        tuple(Tick(TOP + (i + 0.5) * row, str(layer)) for i, layer in shown),
        tuple(Tick(LEFT + (e + 0.5) * column, str(e)) for e in range(0, widest, step)),
        tuple(tiers),
        "; ".join(f"{t.name}: {t.experts} of {total} experts, {t.bytes}" for t in tiers),
    )


def tier_names(plan: Plan) -> list[str]:
    """Tiers in use: the host first, then GPUs, then what is streamed."""
    used = {tier for placement in plan.placement for tier in placement.tiers}
    order = {"host": "0", "streamed": "2"}
    return sorted(used, key=lambda name: (order.get(name, "1"), name))


def tier_colour(name: str) -> int:
    """Which of the style's colours a tier has, the same in every plan."""
    fixed = {"host": 0, "streamed": 4}
    return fixed[name] if name in fixed else 1 + int(re.sub(r"\D", "", name) or 0) % 3
