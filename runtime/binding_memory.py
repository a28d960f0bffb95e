"""Device memory of a plan: what is allocated on each GPU, and what shares bytes with what.

On every GPU, for as long as the binding is open:

    cache      gpu0 alone: one tensor [tokens, width] bf16 for each tensor of each layer, tokens
               numbered as the blocks of runtime/kv.py are
    experts    those placed there, copied once
    weights    dense weights of steps that use no slot, copied once; where a streamed phase ends
               with loading them again, its slots are in the same bytes, and the weights are away
               while it runs
    slots      of streamed phases, of which one runs at a time
    arena      activations: one for the prefill phases and one for those of decode, so that one of
               each may run at once
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch

from hmc.plan import Phase, Plan, Step
from hmc.runtime.binding_weights import ALIGN, Packed, Piece
from hmc.runtime.kv import KVCache
from hmc.runtime.memory import aligned
from hmc.runtime.shares import Share
from hmc.runtime.weights import WeightStore
from hmc.verify import expert_ranges

HOME = "gpu0"


class Device(Protocol):
    """What the binding needs of a device (runtime/devices/)."""

    @property
    def name(self) -> str:
        """ "gpu<n>"."""
        ...

    @property
    def torch_device(self) -> torch.device:
        """Where its tensors are."""
        ...

    def allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        """u8 [nbytes], aligned to 256 bytes; `CapacityError` when it does not fit."""
        ...

    def free(self, tensor: torch.Tensor) -> None:
        """Give an allocation back."""
        ...


def kind_of(phase: Phase) -> str:
    """ "prefill" or "decode"."""
    return "decode" if phase.name.startswith("decode") else "prefill"


def device_of(resource: str) -> str:
    """The device whose memory a resource's steps write: "gpu1" for "gpu1", "h2d1" and "d2h1"."""
    return f"gpu{resource[3:]}" if resource[:3] in ("gpu", "h2d", "d2h") else "host"


def row_capacity(phase: Phase, tokens: int) -> int:
    """Rows of one rank that arenas are laid out for, in calls of up to `tokens` tokens."""
    return Share("rank", 0, phase.ranks).capacity(tokens) if phase.ranks > 1 else tokens


class GpuMemory:
    """The memory of one GPU."""

    def __init__(
        self,
        device: Device,
        plan: Plan,
        store: WeightStore,
        kv: KVCache,
        phases: Mapping[str, int],
        held: bool,
    ) -> None:
        """`phases` names the phases to run and the most tokens of a call of each; with `held` the
        device has the cache.
        """
        self.device = device
        self._taken: list[torch.Tensor] = []
        chosen = [plan.phase(name) for name in phases]
        self.loads = _loads(chosen, device.name, store)
        self.packed = Packed.weights(store, _resident(chosen, device.name))
        try:
            self.experts = {
                layer: (packed, self._filled(packed, f"experts of layer {layer}"))
                for layer, packed in _experts_of(plan, device.name, store).items()
            }
            self._slots(chosen)
            sizes = {"prefill": 0, "decode": 0}
            for phase in chosen:
                rows = row_capacity(phase, phases[phase.name])
                size = phase.device_bytes.get(device.name, 0) * rows
                sizes[kind_of(phase)] = max(sizes[kind_of(phase)], size)
            self.arenas = {
                kind: self._allocate(size, f"activations of {kind}") for kind, size in sizes.items()
            }
            self.caches: dict[tuple[int, int], torch.Tensor] = {}
            if held:
                self._cache(kv)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Free everything."""
        for tensor in self._taken:
            self.device.free(tensor)
        self._taken = []

    @property
    def streamed(self) -> list[Piece]:
        """What loads copy from the host in every call."""
        loads = [*self.loads.values(), *([self.packed] if self.evicts else [])]
        return [piece for packed in loads for piece in packed.pieces]

    def external(self, nbytes: int, purpose: str) -> torch.Tensor:
        """Memory beside the arena, for results of a few rows."""
        return self._allocate(nbytes, purpose)

    def _slots(self, phases: list[Phase]) -> None:
        """Slots one after the other, each as large as the largest load into it. A load that has no
        content of its own brings the resident weights back: they begin where the slots begin."""
        sizes: dict[tuple[str, str], int] = {}
        self.evicts = False
        for phase in phases:
            for step in phase.steps:
                if step.op != "load" or device_of(step.resource) != self.device.name:
                    continue
                if not step.weights:
                    self.evicts = True
                    continue
                for name in step.fills:
                    key = phase.name, name
                    sizes[key] = max(sizes.get(key, 0), self.loads[phase.name, step.id].nbytes)
        starts: dict[tuple[str, str], int] = {}
        ends: dict[str, int] = {}
        for key, size in sizes.items():
            starts[key] = ends.get(key[0], 0)
            ends[key[0]] = starts[key] + aligned(size, ALIGN)
        end = max(ends.values(), default=0)
        if self.evicts:
            both = self._allocate(max(end, self.packed.nbytes), "weights, or slots in their place")
            self.weights = region = both
        else:
            self.weights = self._allocate(self.packed.nbytes, "weights")
            region = self._allocate(end, "slots of streamed weights")
        self.packed.fill(self.weights)
        self.slots = {key: region[start : start + sizes[key]] for key, start in starts.items()}

    def _cache(self, kv: KVCache) -> None:
        tokens = kv.capacity_tokens
        for part, width in enumerate(kv.layout.widths):
            size = aligned(2 * tokens * width, ALIGN)
            raw = self._allocate(size * len(kv.layout.layers), "KV cache")
            for number, layer in enumerate(kv.layout.layers):
                start = size * number
                flat = raw[start : start + 2 * tokens * width].view(torch.bfloat16)
                # padded reads of unwritten rows are multiplied by 0, which NaN would survive
                self.caches[layer, part] = flat.view(tokens, width).zero_()

    def _filled(self, packed: Packed, purpose: str) -> torch.Tensor:
        raw = self._allocate(packed.nbytes, purpose)
        packed.fill(raw)
        return raw

    def _allocate(self, nbytes: int, purpose: str) -> torch.Tensor:
        raw = self.device.allocate(max(ALIGN, nbytes), f"{self.device.name}: {purpose}")
        self._taken.append(raw)
        return raw


def _loads(phases: list[Phase], device: str, store: WeightStore) -> dict[tuple[str, int], Packed]:
    """What each load step of a device brings, by phase and step id."""
    found = {}
    for phase in phases:
        for step in phase.steps:
            if step.op == "load" and device_of(step.resource) == device and step.weights:
                found[phase.name, step.id] = loaded(step, store)
    return found


def loaded(step: Step, store: WeightStore) -> Packed:
    """What a load step brings: weights in the order of their names' roles, or experts."""
    names = list(step.weights.values())
    if names[0].startswith("layer:"):
        layer = int(names[0].removeprefix("layer:"))
        return Packed.of_experts(store, layer, expert_ranges(str(step.attrs["range"])))
    return Packed.weights(store, names)


def _resident(phases: list[Phase], device: str) -> list[str]:
    """Dense weights that steps of a device read from no slot."""
    names = (
        name
        for phase in phases
        for step in phase.steps
        if step.resource == device and not step.uses
        for name in step.weights.values()
        if not name.startswith("layer:")
    )
    return list(dict.fromkeys(names))


def _experts_of(plan: Plan, device: str, store: WeightStore) -> dict[int, Packed]:
    return {
        each.layer: Packed.of_experts(store, each.layer, expert_ranges(each.tiers[device]))
        for each in plan.placement
        if each.tiers.get(device)
    }
