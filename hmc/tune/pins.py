"""Experts pinned to a device by hand: how that is written, and what placement it makes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from hmc.errors import UsageError
from hmc.plan import LayerPlacement, Plan
from hmc.ranges import parse, ranges
from hmc.tune.replan import replan

_FORM = re.compile(r"layers\.(?P<layers>[\d,-]+)\.experts\.(?P<experts>\*|[\d,-]+)=(?P<tier>\w+)")


@dataclass(frozen=True)
class Pin:
    """Experts of some layers (`experts` empty: all of them) on one tier, "host" or "gpu<n>"."""

    text: str
    layers: tuple[int, ...]
    experts: tuple[int, ...]
    tier: str


def parse_pin(text: str) -> Pin:
    """`layers.3-10.experts.0-31=gpu0`; experts may be `*`. `UsageError` for another form."""
    match = _FORM.fullmatch(text)
    if match is None:
        raise UsageError(f"--pin {text}: write layers.3-10.experts.0-31=gpu0 (or experts.*)")
    experts = () if match["experts"] == "*" else tuple(_numbers(text, match["experts"]))
    return Pin(text, tuple(_numbers(text, match["layers"])), experts, match["tier"])


def place(plan: Plan, pins: Sequence[Pin], checkpoint: str = "") -> Plan:
    """The plan with `pins` applied one after the other to its placement, and schedules, ledger and
    switch-over points to match; tile choices stay. `checkpoint` is where the model is if not where
    the plan says.

    Raises `UsageError` for layers, experts or tiers that are not there, `CapacityError` when a GPU
    cannot hold what is pinned to it, `PlanMismatchError` for another checkpoint.
    """
    return replan(plan, pinned(plan, pins), checkpoint)


def pinned(plan: Plan, pins: Sequence[Pin]) -> tuple[LayerPlacement, ...]:
    """The plan's placement with the pins applied."""
    tiers = ("host", *(f"gpu{number}" for number in range(len(plan.machine.gpus))))
    homes = {placement.layer: placement.homes for placement in plan.placement}
    for pin in pins:
        if pin.tier not in tiers:
            raise UsageError(
                f"--pin {pin.text}: machine {plan.machine.name} has no {pin.tier}; tiers are"
                f" {', '.join(tiers)}"
            )
        for layer in pin.layers:
            if layer not in homes:
                routed = ranges(homes) or "none"
                raise UsageError(
                    f"--pin {pin.text}: layer {layer} has no routed experts; layers are {routed}"
                )
            for expert in pin.experts or homes[layer]:
                if expert not in homes[layer]:
                    raise UsageError(
                        f"--pin {pin.text}: layer {layer} has experts 0 to {len(homes[layer]) - 1}"
                    )
                homes[layer][expert] = pin.tier
    return tuple(
        placement.model_copy(
            update={
                "tiers": {
                    tier: ranges(e for e, home in homes[placement.layer].items() if home == tier)
                    for tier in sorted(set(homes[placement.layer].values()), key=tiers.index)
                }
            }
        )
        for placement in plan.placement
    )


def _numbers(pin: str, text: str) -> list[int]:
    try:
        return parse(text)
    except ValueError as error:
        raise UsageError(f"--pin {pin}: {error}") from error
