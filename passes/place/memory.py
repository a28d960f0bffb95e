"""Accounts for the memory of every device: weights and cache by kind, and what running the phases
takes beside them.

Contract
    * the last pass: no phase is added later
    * with a GPU budget, the dense part and the cache are on gpu0, the embedding table on the host,
      experts where placement has them
    * for every GPU the sum is what the runtime allocates when all phases are ready, and what
      operations may take beside that (hmc/plan/memory.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from hmc.passes.place.lm_head import screen_bytes
from hmc.passes.records import Base, Needs
from hmc.plan import Decision, LedgerItem, Phase, Plan
from hmc.plan.memory import HOME, DeviceMemory, device_of, placed_bytes, stored_expert_bytes
from hmc.plan.nodes import shares, strangers, weight_bytes


@dataclass(frozen=True)
class Memory:
    """Fills `Plan.ledger`."""

    name: ClassVar[str] = "memory"

    def run(self, plan: Plan, base: Base) -> Plan:
        home = "host" if base.budget is None else HOME
        weights = [
            _item(device, kind, size, "weights")
            for (device, kind), size in sorted(_weights(plan, base.needs, home).items())
            if size
        ]
        capacity, token = plan.kv.capacity_tokens, plan.kv.bytes_per_token
        held = f"{capacity} tokens x {token} B"
        cache = _item(home, "KV cache", capacity * token, held)
        items = (*weights, cache, *_sequence_states(plan, home))
        if copy := screen_bytes(plan):
            items += (_item("host", "screen", copy, "8-bit copy of the output matrix"),)
        found = plan.model_copy(update={"ledger": items})
        if len(plan.machine.nodes) > 1:
            found = found.model_copy(update={"decisions": (*plan.decisions, _by_node(plan))})
        return accounted(found)


def _by_node(plan: Plan) -> Decision:
    """Which rows lie where on a machine of several NUMA nodes."""
    own, sizes = shares(plan.machine, plan.threads), weight_bytes(plan)
    places = [f"node {node} {size / 1e9:.2f} GB" for node, size in sizes.items()]
    workers = [f"{each.workers} on node {each.node}" for each in own]
    room = {node.id: node.memory_bytes for node in plan.machine.nodes}
    over = [f"node {n} has {room[n] / 1e9:.2f} GB" for n, s in sizes.items() if s > room.get(n, s)]
    reason = (
        f"workers: {', '.join(workers)}; in decode each reads its rows from its node's memory. Of"
        " what all read (cache, activations, matrices in prefill)"
        f" {strangers(own):.0%} cross between nodes"
    )
    if over:
        reason += f"; {', '.join(over)}, and what it has no room for lies elsewhere"
    return Decision(by="memory", subject="weights by node", choice=", ".join(places), reason=reason)


def _sequence_states(plan: Plan, home: str) -> list[LedgerItem]:
    """What states a sequence take, where layers keep any."""
    kv, each = plan.kv, plan.kv.bytes_per_sequence
    if not each:
        return []
    kept = "no prompt reused"
    if kv.snapshots:
        kept = f"{kv.snapshots} snapshots of {kv.bytes_per_snapshot} B"
    detail = f"{kv.sequences} sequences of {each} B, {kept}"
    return [_item(home, "sequence states", kv.bytes_of_sequences, detail)]


def _weights(plan: Plan, needs: Needs, home: str) -> dict[tuple[str, str], int]:
    """Stored bytes of weights by device and kind."""
    found = {(home, kind): size for kind, size in needs.kinds.items()}
    tables = "embedding and output"
    found[home, tables] -= needs.table
    found["host", tables] = found.get(("host", tables), 0) + needs.table
    placed = placed_bytes(plan.placement, stored_expert_bytes(plan))
    return found | {(tier, "routed experts"): size for tier, size in placed.items()}


_KINDS = frozenset({"activations", "streaming", "logits", "scratch", "padding"})


def accounted(plan: Plan) -> Plan:
    """The plan with this part of its ledger made (again)."""
    kept = [item for item in plan.ledger if item.kind not in _KINDS]
    items = [
        _item(
            "host",
            "activations",
            phase.activation_bytes * phase.max_tokens,
            f"{phase.name}: {phase.max_tokens} tokens x {phase.activation_bytes} B",
        )
        for phase in plan.phases
    ]
    for device in sorted({place for phase in plan.phases for place in _places(phase)}):
        stored = sum(item.bytes for item in kept if item.device == device)
        items += _device_items(plan, device, stored)
    return plan.model_copy(update={"ledger": (*kept, *items)})


def _places(phase: Phase) -> set[str]:
    return {device_of(step.resource) for step in phase.steps} - {"host"}


def _device_items(plan: Plan, device: str, stored: int) -> list[LedgerItem]:
    using = [phase for phase in plan.phases if device in _places(phase)]
    found = DeviceMemory.of(plan, device, {phase.name: phase.max_tokens for phase in using})
    streams = list(found.begins)
    over = [name for name in streams if found.begins[name] < found.weights]
    detail = f"slots and activations of {', '.join(streams)}, one at a time"
    if over:
        detail += f"; {', '.join(over)} where {found.weights / 1e9:.1f} GB of dense weights were"
    held = found.weights + found.experts + found.cache
    rows = [
        # none where whole numbers, which memory holds in fewer bytes, make up for it
        (
            "padding",
            max(0, held - stored),
            "tensors begin at multiples of 256 bytes, FP8 scales are f32",
        ),
        ("activations", sum(found.arenas.values()), "a call of decode and a chunk of a prompt"),
        ("streaming", found.region - found.weights, detail),
        ("logits", sum(found.results.values()), "of the rows wanted"),
        ("scratch", found.scratch, "temporaries of operations, in blocks of rows"),
    ]
    return [_item(device, kind, size, about) for kind, size, about in rows if size]


def _item(device: str, kind: str, size: int, detail: str) -> LedgerItem:
    return LedgerItem(device=device, kind=kind, bytes=size, detail=detail)
