"""Decides where every routed expert lives: on the host, sliced by NUMA node, or resident on a GPU
where its budget has room.

Contract
    * requires "kernels"; establishes "placed"
    * every expert of every layer is in exactly one tier; no GPU holds more than its budget
    * a host expert's output rows are cut into one slice a NUMA node, so that workers read their own
      node's memory
    * with a GPU: attention, shared experts, norms and cache come first (`budget.py`), then experts
      by the time a token gains a byte, as the cost model has it

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

import torch.fx

from hmc.graph import NodeMeta, meta
from hmc.passes.context import Context, ranges, stored_bytes
from hmc.passes.place.budget import divide
from hmc.passes.place.nodes import leaves_host, routed_nodes
from hmc.passes.place.solver import Item, solve
from hmc.passes.routing_profile import RoutingCounts
from hmc.plan import LayerPlacement
from hmc.predict.cost import cpu_expert_seconds, gpu_expert_seconds

WORTHWHILE = 1.1
"""Held-out choices that pins must catch, relative to as many experts taken evenly."""


@dataclass(frozen=True)
class ExpertPlacement:
    """Fills `context.budget`, `context.placement` and the device of every node."""

    name: ClassVar[str] = "expert_placement"
    requires: ClassVar[frozenset[str]] = frozenset({"kernels"})
    establishes: ClassVar[frozenset[str]] = frozenset({"placed"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        routed = routed_nodes(graph)
        budget = context.budget = divide(graph, context)
        for node in graph.graph.nodes:
            found = meta(node)
            hybrid = budget is not None and leaves_host(found)
            device, stream = ("gpu0", "gpu0") if hybrid else ("host", "cpu")
            node.meta["hmc"] = found.with_(device=device, stream=stream)
        nodes = len(context.machine.nodes)
        homes: dict[tuple[int, int], int] = {}
        if budget is not None and routed:
            homes = self._residents(context, routed, budget.experts)
        context.placement = tuple(
            LayerPlacement(
                layer=found.layer,
                tiers=_tiers(homes, found.layer, found.attr("experts")),
                node_slices=nodes,
            )
            for found in routed
        )
        if not routed:
            return
        where = "one NUMA node" if nodes == 1 else f"{nodes} NUMA nodes, rows sliced by node"
        subject = f"experts of layers {ranges(each.layer for each in context.placement)}"
        if not context.machine.gpus:
            why = f"machine {context.machine.name} has no GPU"
            context.decide(self.name, subject, f"all on host, {where}", why)
        elif budget is None:
            why = "the GPUs are unused (see above)"
            context.decide(self.name, subject, f"all on host, {where}", why)
        else:
            total = sum(found.attr("experts") for found in routed)
            rooms = ", ".join(
                f"gpu{g} {room / 1e9:.1f} GB" for g, room in enumerate(budget.experts)
            )
            context.decide(
                self.name,
                subject,
                f"{len(homes)} of {total} resident on GPUs, the others on host, {where}",
                f"room for experts after {budget.dense / 1e9:.1f} GB of attention, shared experts"
                f" and norms, {budget.cache / 1e9:.1f} GB of cache ({budget.tokens} tokens) and"
                f" {budget.ring / 1e9:.1f} GB of ring: {rooms}",
            )

    def _residents(
        self, context: Context, routed: list[NodeMeta], budgets: tuple[int, ...]
    ) -> dict[tuple[int, int], int]:
        """(layer, expert) -> GPU of the resident experts."""
        profile = context.options.profile
        if profile is None:
            return self._placed(context, routed, budgets, None)
        pinned = self._placed(context, routed, budgets, profile.learn)
        learned = _caught(profile.learn, pinned)
        held_out = _caught(profile.held_out, pinned)
        layers = {layer for layer, _ in pinned}
        even = len(pinned) / max(
            1, sum(found.attr("experts") for found in routed if found.layer in layers)
        )
        keep = held_out >= WORTHWHILE * even
        context.decide(
            self.name,
            f"{len(pinned)} experts pinned by the routing profile",
            "pinned" if keep else "not pinned: as if routing were even",
            f"of the choices in their layers they catch {learned:.1%} in the part learned from"
            f" ({profile.learn.tokens} tokens) and {held_out:.1%} in the held-out part"
            f" ({profile.held_out.tokens} tokens); as many taken evenly catch {even:.1%}, and pins"
            f" are recommended from {WORTHWHILE} times that on",
        )
        return pinned if keep else self._placed(context, routed, budgets, None)

    def _placed(
        self,
        context: Context,
        routed: list[NodeMeta],
        budgets: tuple[int, ...],
        counts: RoutingCounts | None,
    ) -> dict[tuple[int, int], int]:
        rates = context.machine.rates
        assert rates is not None
        items = []
        for found in routed:
            experts, top_k = found.attr("experts"), found.attr("top_k")
            chances = counts.probabilities(found.layer, experts) if counts else []
            form = dict(found.formats)["gate"]
            columns = [context.source(weight) for weight in found.weights]
            gained: dict[int, tuple[float, ...]] = {}
            for expert in range(experts):
                size = sum(stored_bytes(column[expert]) for column in columns)
                if size not in gained:
                    host = cpu_expert_seconds(rates, form, size)
                    gained[size] = tuple(
                        host - gpu_expert_seconds(gpu.rates, size)
                        for gpu in context.machine.gpus
                        if gpu.rates is not None
                    )
                chance = chances[expert] if chances else top_k / experts
                gains = tuple(chance * gain for gain in gained[size])
                items.append(Item(found.layer, expert, size, gains))
        result = solve(items, budgets)
        if result.gain > 0:
            context.decide(
                self.name,
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


def _tiers(homes: Mapping[tuple[int, int], int], layer: int, experts: int) -> dict[str, str]:
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
