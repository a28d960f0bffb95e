"""What streamed prefill may take of each GPU: slots, and activations of how many tokens beside
them.

Whether dense weights stay on gpu0 while a prompt streams is decided here too: where there is room
for them beside a layer's experts and the longest prompt's activations.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.passes.records import Budget
from hmc.passes.stream.emit import ring_turns, streamed_experts
from hmc.plan import Phase, Plan
from hmc.plan.memory import DeviceMemory, expert_bytes, slot_offsets


@dataclass(frozen=True)
class StreamMemory:
    """The GPUs of a streamed phase, and whether dense weights stay on gpu0 (`keep_dense`)."""

    plan: Plan
    budget: Budget
    gpus: tuple[int, ...]
    keep_dense: bool

    @staticmethod
    def of(plan: Plan, budget: Budget, gpus: tuple[int, ...]) -> StreamMemory:
        """The memory of GPUs `gpus`, one a rank."""
        layer = max(expert_bytes(plan).values()) * plan.model.experts // len(gpus)
        tokens = plan.limits.max_context // len(gpus) * budget.stream_token
        found = DeviceMemory.of(plan, "gpu0", {each.name: each.max_tokens for each in plan.phases})
        free = budget.usable[0] - found.beside - found.weights
        return StreamMemory(plan, budget, gpus, free >= layer + tokens)

    @property
    def streams_dense(self) -> tuple[bool, ...]:
        """By rank: whether its GPU loads the dense weights layer by layer."""
        return tuple(gpu > 0 or not self.keep_dense for gpu in self.gpus)

    @property
    def streamed(self) -> int:
        """The most experts of a layer that one GPU streams."""
        layers = [each.layer for each in self.plan.placement]
        return max(len(streamed_experts(self.plan, layer, 0, self.gpus)) for layer in layers)

    def ring_text(self, ring: int) -> str:
        """A ring in words."""
        each = "each GPU" if len(self.gpus) > 1 else f"gpu{self.gpus[0]}"
        size = ring * max(expert_bytes(self.plan).values())
        return (
            f"{ring} of the {self.streamed} experts a layer streams to {each},"
            f" {size / 1e9:.1f} GB in loads of {ring_turns(ring)[0]}"
        )

    def room(self, phase: Phase, gpu: int) -> int:
        """Bytes of a GPU for the phase's slots and activations."""
        others = [each for each in self.plan.phases if each.name != phase.name]
        plan = self.plan.model_copy(update={"phases": (*others, phase)})
        calls = {each.name: each.max_tokens for each in plan.phases}
        found = DeviceMemory.of(plan, f"gpu{gpu}", calls)
        return self.budget.usable[gpu] - found.beside - found.begins[phase.name]

    def tokens(self, phase: Phase, ring: int) -> int:
        """Prompt tokens of one call, if the phase had a ring of `ring` experts."""
        return min(self._tokens(phase, gpu, ring) for gpu in self.gpus)

    def _tokens(self, phase: Phase, gpu: int, ring: int) -> int:
        device = f"gpu{gpu}"
        mine = [slot for slot in phase.slots if slot.device == device]
        group, turns = ring_turns(ring)
        sizes = [(slot.bytes, False) for slot in mine if slot.name.startswith(("attention", "mlp"))]
        sizes += [(max(expert_bytes(self.plan).values()) * group, False)] * turns
        sizes += [(slot.bytes, True) for slot in mine if slot.name.startswith("head")]
        free = self.room(phase, gpu) - slot_offsets(sizes)[1]
        rows = max(0, free) // phase.device_bytes[device]
        return rows if phase.ranks == 1 else rows // 2 * 2 * phase.ranks

    def reason(self, phase: Phase) -> str:
        """What else is on the GPUs."""
        return "; ".join(
            f"gpu{gpu} has {(self.budget.usable[gpu] - self.room(phase, gpu)) / 1e9:.1f} of"
            f" {self.budget.usable[gpu] / 1e9:.1f} GB in use otherwise"
            + (" (dense weights streamed)" if streams else "")
            for gpu, streams in zip(self.gpus, self.streams_dense, strict=True)
        )
