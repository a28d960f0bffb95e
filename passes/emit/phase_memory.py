"""Accounts for what running the phases takes: activations on the host, and on each GPU what weights
and cache leave uncounted.

Contract
    * requires "plan" and every phase in it; establishes "accounted"
    * the plan's ledger is complete afterwards: for every GPU its sum is what the runtime allocates
      when all phases are ready, and what operations may take beside that (hmc/plan/memory.py)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.passes.context import Context
from hmc.plan import LedgerItem, Phase, Plan
from hmc.plan.memory import DeviceMemory, device_of


@dataclass(frozen=True)
class PhaseMemory:
    """Completes `context.ledger` and gives it, and every decision, to `context.plan`."""

    name: ClassVar[str] = "phase_memory"
    requires: ClassVar[frozenset[str]] = frozenset({"plan", "streamed", "dual"})
    establishes: ClassVar[frozenset[str]] = frozenset({"accounted"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        plan = context.plan
        assert plan is not None
        update = {"ledger": tuple(context.ledger), "decisions": tuple(context.decisions)}
        context.plan = accounted(plan.model_copy(update=update))


_KINDS = frozenset({"activations", "streaming", "logits", "scratch", "padding"})


def accounted(plan: Plan) -> Plan:
    """The plan with this part of its ledger made (again)."""
    kept = [item for item in plan.ledger if item.kind not in _KINDS]
    items = [
        LedgerItem(
            device="host",
            kind="activations",
            bytes=phase.activation_bytes * phase.max_tokens,
            detail=f"{phase.name}: {phase.max_tokens} tokens x {phase.activation_bytes} B",
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
        ("padding", held - stored, "tensors begin at multiples of 256 bytes, FP8 scales are f32"),
        ("activations", sum(found.arenas.values()), "a call of decode and a chunk of a prompt"),
        ("streaming", found.region - found.weights, detail),
        ("logits", sum(found.results.values()), "of the rows wanted"),
        ("scratch", found.scratch, "temporaries of operations, in blocks of rows"),
    ]
    return [
        LedgerItem(device=device, kind=kind, bytes=size, detail=about)
        for kind, size, about in rows
        if size
    ]
