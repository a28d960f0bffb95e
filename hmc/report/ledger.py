"""Memory by device and kind, as stacked bars against what each device has."""

from __future__ import annotations

from dataclasses import dataclass

from hmc.plan import Plan
from hmc.report.words import si


@dataclass(frozen=True)
class Item:
    """One kind on one device; `left` and `width` are shares of the bar in percent."""

    kind: str
    colour: int
    bytes: str
    share: float
    left: float
    width: float
    detail: str


@dataclass(frozen=True)
class Device:
    """One bar; `limit` is where the device's memory ends, in percent of the bar."""

    name: str
    used: str
    memory: str
    fits: bool
    limit: float
    items: tuple[Item, ...]


def ledger(plan: Plan) -> tuple[Device, ...]:
    """One bar a device, the largest kinds first."""
    kinds = list(dict.fromkeys(item.kind for item in sorted(plan.ledger, key=lambda i: -i.bytes)))
    devices = []
    for name in dict.fromkeys(item.device for item in plan.ledger):
        items = sorted((i for i in plan.ledger if i.device == name), key=lambda i: -i.bytes)
        total = sum(item.bytes for item in items)
        memory = plan.machine.memory_of(name)
        scale = 100 / max(total, memory)
        left, found = 0.0, []
        for item in items:
            width = item.bytes * scale
            colour = kinds.index(item.kind) % 10
            size, share = si(item.bytes, "B"), item.bytes / total if total else 0.0
            found.append(Item(item.kind, colour, size, share, left, width, item.detail))
            left += width
        devices.append(
            Device(
                name, si(total, "B"), si(memory, "B"), total <= memory, memory * scale, tuple(found)
            )
        )
    return tuple(devices)
