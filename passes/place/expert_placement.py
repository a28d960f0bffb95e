"""Decides where every routed expert lives, on the host or resident on a GPU where its budget has
room, and rewrites the phases for it.

Contract
    * without a GPU budget the plan stays as it is
    * every expert of every layer is in exactly one tier; no GPU holds more than its budget
    * with a GPU: attention, shared experts, norms and cache come first (`budget.py`), then experts
      by the time a token gains a byte, as the cost model has it; the dense part of every phase runs
      on gpu0, experts where they are (hmc/passes/emit/hybrid.py)

Method
    1. the gain of an expert on a GPU: its chance to be chosen x (CPU time - GPU time)
    2. `solver.py` fills the budgets; at equal gains layer by layer, so that whole layers leave the
       CPU
    3. a routing profile makes chances uneven. What was learned is judged on the held-out part: pins
       that gain less than `WORTHWHILE` times an even choice there are advised against and not made
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from hmc.errors import CapacityError
from hmc.formats import format_of
from hmc.passes.emit.hybrid import hybrid_phase
from hmc.passes.place.solver import Item, solve
from hmc.passes.records import Base, Budget, Notes
from hmc.plan import LayerPlacement, Plan
from hmc.plan.memory import placed_bytes, stored_expert_bytes
from hmc.plan.routing_profile import RoutingCounts, RoutingProfile
from hmc.predict.cost import cpu_expert_seconds, declared_as, gpu_expert_seconds
from hmc.ranges import ranges

WORTHWHILE = 1.1
"""Held-out choices that pins must catch, relative to as many experts taken evenly."""

Homes = dict[tuple[int, int], int]
"""(layer, expert) -> GPU of the resident experts."""


@dataclass(frozen=True)
class ExpertPlacement:
    """Fills `Plan.placement`, by the routing `profile` if there is one, or takes the one `given`;
    and moves the phases' steps to the GPUs.
    """

    name: ClassVar[str] = "expert_placement"

    profile: RoutingProfile | None = None
    given: tuple[LayerPlacement, ...] = ()

    def run(self, plan: Plan, base: Base) -> Plan:
        notes = Notes(self.name)
        if self.given:
            _check_room(plan, self.given, base)
            placement = self.given
        elif plan.placement:
            placement = self._solved(plan, base.budget, notes)
        else:
            placement = ()
        if base.budget is None:
            return notes.on(plan)
        _note_rates(plan, notes)
        homes = {each.layer: each for each in placement}
        phases = tuple(hybrid_phase(phase, homes) for phase in plan.phases)
        return notes.on(plan, placement=placement, phases=phases)

    def _solved(
        self, plan: Plan, budget: Budget | None, notes: Notes
    ) -> tuple[LayerPlacement, ...]:
        subject = f"experts of layers {ranges(each.layer for each in plan.placement)}"
        if budget is None:
            alone = f"machine {plan.machine.name} has no GPU"
            why = "the GPUs are unused (see above)" if plan.machine.gpus else alone
            notes.decide(subject, "all on host", why)
            return plan.placement
        homes = self._residents(plan, budget.experts, notes)
        rooms = ", ".join(f"gpu{g} {room / 1e9:.1f} GB" for g, room in enumerate(budget.experts))
        total = sum(_counts(plan).values())
        notes.decide(
            subject,
            f"{len(homes)} of {total} resident on GPUs, the others on host",
            f"room for experts after {budget.dense / 1e9:.1f} GB of attention, shared experts"
            f" and norms, {budget.cache / 1e9:.1f} GB of cache ({budget.tokens} tokens) and"
            f" {budget.ring / 1e9:.1f} GB of ring: {rooms}",
        )
        return tuple(
            LayerPlacement(layer=layer, tiers=_tiers(homes, layer, count))
            for layer, count in _counts(plan).items()
        )

    def _residents(self, plan: Plan, budgets: tuple[int, ...], notes: Notes) -> Homes:
        profile = self.profile
        if profile is None:
            return _placed(plan, budgets, None, notes)
        pinned = _placed(plan, budgets, profile.learn, notes)
        learned = _caught(profile.learn, pinned)
        held_out = _caught(profile.held_out, pinned)
        layers = {layer for layer, _ in pinned}
        counts = _counts(plan)
        even = len(pinned) / max(1, sum(counts[layer] for layer in layers))
        keep = held_out >= WORTHWHILE * even
        notes.decide(
            f"{len(pinned)} experts pinned by the routing profile",
            "pinned" if keep else "not pinned: as if routing were even",
            f"of the choices in their layers they catch {learned:.1%} in the part learned from"
            f" ({profile.learn.tokens} tokens) and {held_out:.1%} in the held-out part"
            f" ({profile.held_out.tokens} tokens); as many taken evenly catch {even:.1%}, and pins"
            f" are recommended from {WORTHWHILE} times that on",
        )
        return pinned if keep else _placed(plan, budgets, None, notes)


def _note_rates(plan: Plan, notes: Notes) -> None:
    """Say which formats of weights are taken for others, whose rates are known."""
    rates = plan.machine.known_rates
    forms = {each.format for each in plan.experts} | {each.format for each in plan.weights}
    for form in sorted(forms):
        other = declared_as(rates, form)
        if other != form and format_of(form).scales:
            notes.decide(
                f"rates of {form}",
                f"as {other}",
                f"machine {plan.machine.name} declares none for it; {other} is nearest in bits",
            )


def _placed(
    plan: Plan, budgets: tuple[int, ...], profile: RoutingCounts | None, notes: Notes
) -> Homes:
    """The experts that gain the most, by recorded routing or as if it were even."""
    rates = plan.machine.rates
    assert rates is not None
    sizes, items = stored_expert_bytes(plan), []
    for each in plan.experts:
        if each.role != "up":
            continue
        layer, size = each.layer, sizes[each.layer]
        host = cpu_expert_seconds(rates, each.format, size)
        gained = tuple(
            host - gpu_expert_seconds(gpu.rates, size)
            for gpu in plan.machine.gpus
            if gpu.rates is not None
        )
        chances = profile.probabilities(layer, each.count) if profile else []
        for expert in range(each.count):
            chance = chances[expert] if chances else plan.model.top_k / each.count
            items.append(Item(layer, expert, size, tuple(chance * gain for gain in gained)))
    result = solve(items, budgets)
    if result.gain > 0:
        notes.decide(
            "experts by gain a byte",
            f"{result.gain * 1e3:.2f} ms less CPU time a token",
            f"no placement in these budgets gains more than {result.bound * 1e3:.2f} ms"
            f" ({result.gain / result.bound:.2%} of the linear bound)",
        )
    return {
        (item.layer, item.expert): home
        for item, home in zip(items, result.homes, strict=True)
        if home >= 0
    }


def _counts(plan: Plan) -> dict[int, int]:
    """Routed experts by layer."""
    return {each.layer: each.count for each in plan.experts}


def _check_room(plan: Plan, given: tuple[LayerPlacement, ...], base: Base) -> None:
    """Raise `CapacityError` where a GPU has no room for what is placed there, or cannot read it."""
    budget, why = base.budget, base.needs.dense_unread or base.needs.experts_unread
    for tier, size in placed_bytes(given, stored_expert_bytes(plan)).items():
        if tier == "host":
            continue
        if why:
            raise CapacityError(f"nothing can be pinned to {tier}: {why}")
        if budget is None:
            raise CapacityError(
                f"the plan uses no GPU of {plan.machine.name}: its rates are not known, or the"
                " dense part does not fit; nothing can be pinned there"
            )
        room = budget.experts[int(tier.removeprefix("gpu"))]
        if size > room:
            raise CapacityError(
                f"{size / 1e9:.1f} GB of experts are pinned to {tier}, which has room for"
                f" {room / 1e9:.1f} GB beside dense weights, cache and activations: pin fewer"
            )


def _tiers(homes: Homes, layer: int, experts: int) -> dict[str, str]:
    """Expert ranges of one layer by tier; tiers that hold none are left out."""
    members: dict[str, list[int]] = {}
    for expert in range(experts):
        home = homes.get((layer, expert), -1)
        members.setdefault("host" if home < 0 else f"gpu{home}", []).append(expert)
    return {tier: ranges(numbers) for tier, numbers in members.items()}


def _caught(counts: RoutingCounts, pinned: Mapping[tuple[int, int], int]) -> float:
    """Share of the recorded choices, in the layers with pins, that went to pinned experts."""
    layers = {layer for layer, _ in pinned}
    total = sum(sum(counts.counts.get(layer, ())) for layer in layers)
    caught = sum(counts.counts[layer][expert] for layer, expert in pinned if layer in counts.counts)
    return caught / total if total else 0.0
