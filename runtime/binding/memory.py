"""Device memory of a plan, laid out as hmc/plan/memory.py says, for as long as a binding is open:
what the names there stand for in tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from hmc.plan import KVLayout, Phase, Step
from hmc.plan.memory import (
    ALIGN,
    HOME,
    DeviceMemory,
    aligned,
    device_of,
    evicts,
    kind_of,
    rank_rows,
    resident_names,
    result_bytes,
)
from hmc.ranges import expert_ranges
from hmc.runtime.binding.weights import Packed, Piece
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.devices.gpu import Gpu
from hmc.runtime.devices.lending import Lent
from hmc.runtime.host.lowering import Parts
from hmc.runtime.weights.store import WeightStore

TORCH_TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "i32": torch.int32}


@dataclass(frozen=True)
class LentMemory:
    """A GPU's memory for the process of its rank: rank 0's process has it, and uses it too."""

    region: Lent
    experts: Mapping[int, Lent]


class GpuMemory:
    """The memory of one GPU."""

    def __init__(
        self,
        device: Gpu,
        parts: Parts,
        phases: Sequence[Phase],
        own: Sequence[Phase],
        lent: LentMemory | None,
    ) -> None:
        """For `phases` of a plan, of which this process runs the parts `own`; the home GPU has the
        cache. With `lent`, experts and region are another process's.
        """
        plan, store, name = parts.plan, parts.store, device.name
        self.device = device
        self._lent = lent is not None
        self._taken: list[torch.Tensor] = []
        self._kv = parts.kv
        self._kept: list[torch.Tensor] = []
        self._spaces: dict[str, Workspace] = {}
        calls = {phase.name: phase.max_tokens for phase in phases}
        self._layout = DeviceMemory.of(plan, name, calls)
        self._evicts = any(evicts(phase, name) for phase in phases)
        self.loads = {
            (phase.name, step.id): _loaded(step, store)
            for phase in own
            for step in phase.steps
            if step.op == "load" and device_of(step.resource) == name and step.weights
        }
        self.packed = Packed.weights(store, resident_names(phases, name))
        self.experts: dict[int, tuple[Packed, torch.Tensor]] = {}
        try:
            for each in plan.placement:
                if some := expert_ranges(each.tiers.get(name, "")):
                    packed = Packed.of_experts(store, each.layer, some)
                    what = f"experts of layer {each.layer}"
                    theirs = lent.experts[each.layer] if lent else None
                    raw = self._had(packed.nbytes, what, theirs)
                    self.experts[each.layer] = packed, raw
            what = "weights, and slots and activations of streamed prompts"
            self._region = self._had(self._layout.region, what, lent.region if lent else None)
            self.weights = self._region[: self.packed.nbytes]
            self._slots = {
                (phase.name, slot.name): self._layout.begins[phase.name] + slot.offset
                for phase in phases
                for slot in phase.slots
                if slot.device == name
            }
            self._arenas = {
                kind: self._had(size, f"activations of {kind}")
                for kind, size in self._layout.arenas.items()
            }
            self._results = {
                kind: self._had(size, f"logits of {kind}")
                for kind, size in self._layout.results.items()
            }
            self.caches: dict[tuple[int, str], torch.Tensor] = {}
            if name == HOME:
                self._cache(parts.kv.layout)
        except BaseException:
            self.close()
            raise

    def fill(self) -> None:
        """Copy the weights that stay. Experts that another process has lent are there."""
        self.packed.fill(self.weights)
        if not self._lent:
            for packed, raw in self.experts.values():
                packed.fill(raw)

    def close(self) -> None:
        """Free everything."""
        self._kv.detach(self)
        for tensor in self._taken:
            self.device.free(tensor)
        self._taken = []

    @property
    def streamed(self) -> list[Piece]:
        """What loads copy from the host in every call."""
        loads = [*self.loads.values(), *([self.packed] if self._evicts else [])]
        return [piece for packed in loads for piece in packed.pieces]

    def result(self, phase: Phase, name: str, rows: int) -> torch.Tensor:
        """Memory beside the arena for `rows` rows of a buffer of results: u8 [bytes]."""
        start = 0
        for each, size in result_bytes(phase, self.device.name, rows):
            if each == name:
                return self._results[kind_of(phase)][start : start + size]
            start += size
        raise KeyError(f"phase {phase.name} has no buffer {name} on {self.device.name}")

    def workspace(self, phase: Phase) -> Workspace:
        """What split sums need; phases of a kind do not run at the same time."""
        kind = kind_of(phase)
        if kind not in self._spaces:
            self._spaces[kind] = Workspace(self.device.torch_device)
        return self._spaces[kind]

    def slot(self, phase: str, load: int, name: str) -> tuple[Packed, torch.Tensor]:
        """What load step `load` brings into a slot of a phase, and its bytes there."""
        packed, start = self.loads[phase, load], self._slots[phase, name]
        return packed, self._region[start : start + packed.nbytes]

    def rows(self, phase: Phase, offset: int, size: int) -> torch.Tensor:
        """Activations of a phase from `offset` bytes a token on, `size` bytes each: u8 [all of a
        call's tokens or a rank's share of them, size]."""
        tokens = phase.max_tokens
        capacity = rank_rows(tokens, phase.ranks)
        kind = kind_of(phase)
        if kind == "stream":
            begin = self._layout.begins[phase.name] + phase.arena_at.get(self.device.name, 0)
            arena = self._region[begin:]
        else:
            arena = self._arenas[kind]
        start, end = offset * capacity, phase.device_bytes[self.device.name] * capacity
        count = min(tokens, (end - start) // size)  # a rank's share, or all ranks' rows
        return arena[start : start + count * size].view(count, size)

    def _cache(self, layout: KVLayout) -> None:
        for name in dict.fromkeys(state.name for _, state in layout.each()):
            found = [(layer, state) for layer, state in layout.each() if state.name == name]
            size = sum(aligned(layout.rows(layer, state) * state.bytes) for layer, state in found)
            raw, start = self._had(size, f"cache of {name}"), 0
            for layer, state in found:
                rows = layout.rows(layer, state)
                flat = raw[start : start + rows * state.bytes].view(TORCH_TYPES[state.dtype])
                # padded reads of unwritten rows are multiplied by 0, which NaN would survive
                self.caches[layer, name] = flat.view(rows, state.width).zero_()
                start += aligned(rows * state.bytes)
                if state.per == "sequence":
                    self._kept.append(self.caches[layer, name])
        self._kv.attach(self)

    def clear(self, slot: int) -> None:
        """Zero the states a sequence of a slot."""
        for slots in self._kept:
            slots[slot].zero_()
        self._settle()

    def copy(self, source: int, target: int) -> None:
        """Copy the states a sequence of a slot to another."""
        for slots in self._kept:
            slots[target].copy_(slots[source])
        self._settle()

    def _settle(self) -> None:
        """Wait for what was done to slots: the streams of steps do not."""
        if self._kept and self._kept[0].is_cuda:
            torch.cuda.current_stream(self._kept[0].device).synchronize()

    def lend(self) -> LentMemory:
        """This memory, for the process of the GPU's rank."""
        experts = {layer: self.device.lend(raw) for layer, (_, raw) in self.experts.items()}
        return LentMemory(self.device.lend(self._region), experts)

    def _had(self, nbytes: int, what: str, lent: Lent | None = None) -> torch.Tensor:
        """Memory of this process, or what another one has lent; until `close`."""
        purpose = f"{self.device.name}: {what}"
        self._taken.append(
            self.device.allocate(max(ALIGN, nbytes), purpose)
            if lent is None
            else self.device.borrow(lent, purpose)
        )
        return self._taken[-1]


def _loaded(step: Step, store: WeightStore) -> Packed:
    """What a load step brings: weights in the order of their names' roles, or experts."""
    names = list(step.weights.values())
    if names[0].startswith("layer:"):
        layer = int(names[0].removeprefix("layer:"))
        return Packed.of_experts(store, layer, expert_ranges(str(step.attrs["range"])))
    return Packed.weights(store, names)
