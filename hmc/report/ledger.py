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


def ledger(plan: Plan) -> list[Device]:
    """One bar a device, the largest kinds first."""
    largest = sorted(plan.ledger, key=lambda item: -item.bytes)
    kinds = list(dict.fromkeys(item.kind for item in largest))
    devices = []
    for name, total in plan.ledger_totals.items():
        memory = plan.machine.memory_of(name)
        scale = 100 / max(total, memory)
        left, found = 0.0, []
        for item in (each for each in largest if each.device == name):
            width, share = item.bytes * scale, item.bytes / total if total else 0.0
            colour, size = kinds.index(item.kind) % 10, si(item.bytes, "B")
            found.append(Item(item.kind, colour, size, share, left, width, item.detail))
            left += width
        used, fits = si(total, "B"), total <= memory
        devices.append(Device(name, used, si(memory, "B"), fits, memory * scale, tuple(found)))
    return devices
