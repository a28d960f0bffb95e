"""Where every routed expert is, as runs of equal cells on a grid of layers and experts."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from hmc.plan import Plan
from hmc.ranges import expert_intervals
from hmc.report.words import Tick, si

WIDTH, LEFT, TOP, BOTTOM = 1200, 52, 8, 40


@dataclass(frozen=True)
class Cell:
    """A run of experts of one layer in one tier."""

    x: float
    y: float
    width: float
    height: float
    tier: int
    title: str


@dataclass(frozen=True)
class Tier:
    """A tier in the legend."""

    name: str
    index: int
    experts: int
    share: float
    bytes: str


@dataclass(frozen=True)
class HeatMap:
    """The chart; `column` is the width of one expert."""

    width: float
    height: float
    cells: tuple[Cell, ...]
    rows: tuple[Tick, ...]
    columns: tuple[Tick, ...]
    column: float
    tiers: tuple[Tier, ...]
    summary: str


def heat_map(plan: Plan) -> HeatMap | None:
    """The map of a plan; None for a model without routed experts."""
    if not plan.placement:
        return None
    sizes: Counter[int] = Counter()
    counts: dict[int, int] = {}
    for part in plan.experts:
        sizes[part.layer] += part.bytes
        counts[part.layer] = part.count
    widest = max(counts.values())
    row = float(max(5, min(18, 520 // len(plan.placement))))
    column = (WIDTH - LEFT) / widest
    names = tier_names(plan)
    cells: list[Cell] = []
    held: Counter[str] = Counter()
    bytes_held: Counter[str] = Counter()
    for number, placement in enumerate(plan.placement):
        y = TOP + number * row
        for tier, text in placement.tiers.items():
            for first, last in expert_intervals(text):
                count = last - first + 1
                held[tier] += count
                bytes_held[tier] += count * sizes[placement.layer]
                title = (
                    f"layer {placement.layer}, expert{'s' if count > 1 else ''} "
                    f"{first if count == 1 else f'{first} to {last}'}: {tier},"
                    f" {si(count * sizes[placement.layer], 'B')}"
                )
                x = LEFT + first * column
                cells.append(Cell(x, y, count * column, row, names.index(tier), title))
    total = sum(held.values())
    layers = [placement.layer for placement in plan.placement]
    every = math.ceil(13 / row)
    step = next(s for s in (1, 2, 4, 8, 16, 32, 64, 128) if widest / s <= 16 or s == 128)
    tiers = tuple(
        Tier(name, index, held[name], held[name] / total, si(bytes_held[name], "B"))
        for index, name in enumerate(names)
    )
    return HeatMap(
        WIDTH,
        TOP + row * len(layers) + BOTTOM,
        tuple(cells),
        tuple(
            Tick(TOP + (i + 0.5) * row, str(layer))
            for i, layer in enumerate(layers)
            if i % every == 0
        ),
        tuple(Tick(LEFT + (e + 0.5) * column, str(e)) for e in range(0, widest, step)),
        column,
        tiers,
        "; ".join(f"{t.name}: {t.experts} of {total} experts, {t.bytes}" for t in tiers),
    )


def tier_names(plan: Plan) -> list[str]:
    """Tiers in use: the host first, then GPUs, then what is streamed."""
    used = {tier for placement in plan.placement for tier in placement.tiers}
    order = {"host": "0", "streamed": "2"}
    return sorted(used, key=lambda name: (order.get(name, "1"), name))
