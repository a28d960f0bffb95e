"""What a plan takes of each GPU: one layout, which the ledger counts and the runtime allocates.

    cache      gpu0 alone: one tensor [tokens or slots, width] for each state of each layer
    experts    those placed there
    region     dense weights that steps use where they lie; and of every phase that streams, of
               which one runs at a time, slots (`Slot.offset`) and then activations
               (`Phase.arena_at`). A phase that ends with loading the dense weights again begins
               where they begin, and they are away while it runs; others begin behind them
    arenas     activations of the other phases: those of decode, and of chunks of prompts. One call
               of each kind may run at a time, beside one that streams
    results    logits of the rows that are wanted, for each kind of phase
    scratch    temporaries of operations, which work through their rows in blocks

Hides how tensors are padded, which phases share bytes, and how many rows a rank has.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hmc.ops.row import PAGED
from hmc.plan.base import DTYPE_BYTES
from hmc.plan.model import EXTERNAL, ExpertWeights, LayerPlacement, Phase, Plan, Step, Weight
from hmc.plan.states import KVLayout
from hmc.plan.stored import forms_of
from hmc.ranges import expert_ranges

HOME = "gpu0"
"""The GPU that has the cache and the dense weights of decode."""
ALIGN = 256
"""Bytes tensors are aligned to on devices."""
SCRATCH = 512 << 20
"""Bytes for temporaries of the operations on one GPU (runtime/device_ops/scratch.py), but for those
in `context_scratch`."""


PAGED_SCRATCH = 512 << 20
"""Bytes that the library of paged attention keeps on the GPU of the cache: 128 MiB for parts of
sums, and 8 MiB of what it plans for each kind of calls that is kept, of each phase and lane."""

Kind = Literal["decode", "chunk", "stream"]


def kind_of(phase: Phase) -> Kind:
    """Which phases share memory: those that stream weights, those of decode, the others."""
    if phase.name.startswith("decode"):
        return "decode"
    return "stream" if any(step.op == "load" for step in phase.steps) else "chunk"


def device_of(resource: str) -> str:
    """The device whose memory a resource's steps write: "gpu1" for "gpu1", "h2d1" and "d2h1"."""
    return f"gpu{resource[3:]}" if resource[:3] in ("gpu", "h2d", "d2h") else "host"


def paged(step: Step) -> bool:
    """Whether the library of paged attention computes a step."""
    return any(key.startswith(f"{PAGED}:") for key in step.kernels)


def aligned(size: int) -> int:
    """Bytes that an allocation of `size` bytes takes."""
    return -(-size // ALIGN) * ALIGN


def packed_bytes(weights: Iterable[Weight | ExpertWeights]) -> int:
    """Bytes of weights one after the other, each with its planes one after the other."""
    return sum(aligned(form.bytes) for weight in weights for form in forms_of(weight))


def expert_bytes(plan: Plan) -> dict[int, int]:
    """By layer, what one routed expert takes on a device."""
    return _by_layer(plan, lambda each: packed_bytes((each,)))


def stored_expert_bytes(plan: Plan) -> dict[int, int]:
    """Stored bytes of one routed expert, by layer."""
    return _by_layer(plan, lambda each: each.bytes)


def _by_layer(plan: Plan, size: Callable[[ExpertWeights], int]) -> dict[int, int]:
    found: Counter[int] = Counter()
    for each in plan.experts:
        found[each.layer] += size(each)
    return dict(found)


def placed_bytes(placement: Iterable[LayerPlacement], sizes: Mapping[int, int]) -> dict[str, int]:
    """Bytes of routed experts by tier, one of a layer taking `sizes[layer]`."""
    found: Counter[str] = Counter()
    for each in placement:
        for tier, text in each.tiers.items():
            found[tier] += sizes[each.layer] * len(expert_ranges(text))
    return dict(found)


def resident_names(phases: Iterable[Phase], device: str) -> list[str]:
    """Dense weights that steps of a device use where they lie, in no slot."""
    names = (
        name
        for phase in phases
        for step in phase.steps
        if step.resource == device and not step.uses
        for name in step.weights.values()
        if not name.startswith("layer:")
    )
    return list(dict.fromkeys(names))


def restores(step: Step) -> bool:
    """Whether a step brings the dense weights of decode back to their place."""
    return step.op == "load" and not step.weights


def evicts(phase: Phase, device: str) -> bool:
    """Whether a device's dense weights are away while a phase runs."""
    return any(restores(step) and device_of(step.resource) == device for step in phase.steps)


def rank_rows(tokens: int, ranks: int) -> int:
    """Rows of one rank in calls of up to `tokens` tokens: two of 2 x `ranks` equal pieces."""
    return tokens if ranks == 1 else 2 * -(-tokens // (2 * ranks))


def wanted_rows(plan: Plan, phase: Phase, tokens: int) -> int:
    """Rows of logits that one call of up to `tokens` tokens can give: all of a chunk, as many as
    sequences decode of a prompt whose weights stream."""
    most = plan.limits.max_batch if kind_of(phase) == "stream" else plan.limits.max_chunk
    return min(tokens, max(most, plan.limits.max_batch))


def result_bytes(phase: Phase, device: str, rows: int) -> list[tuple[str, int]]:
    """Buffers on a device for results of `rows` rows, with the bytes they take."""
    return [
        (buffer.name, aligned(DTYPE_BYTES[buffer.dtype] * buffer.width * rows))
        for buffer in phase.buffers
        if buffer.device == device and buffer.offset == EXTERNAL
    ]


def context_scratch(kv: KVLayout, context: int) -> int:
    """Bytes that attention over `context` tokens takes whatever the size of its blocks: latents of
    the past and of the call side by side, and keys and values of one head lifted from them, which
    are no wider. Where indexers choose, PyTorch makes latents in f32 of those in bf16."""
    return (6 if kv.widest("indexer_k") else 4) * kv.widest("latent") * context


def slot_offsets(sizes: Sequence[tuple[int, bool]]) -> tuple[list[int], int]:
    """Where slots of (bytes, lies over the others) begin, and where the last one ends: those that
    lie over others at 0, the rest one after the other."""
    places, end = [], 0
    for size, over in sizes:
        places.append(0 if over else end)
        end += 0 if over else aligned(size)
    return places, max([end, *(aligned(size) for size, over in sizes if over)])


@dataclass(frozen=True)
class DeviceMemory:
    """Bytes of one GPU, for some phases of a plan with calls of up to so many tokens each."""

    experts: int
    cache: int
    weights: int
    region: int
    scratch: int
    arenas: Mapping[Kind, int]
    results: Mapping[Kind, int]
    begins: Mapping[str, int]
    """By phase that streams, where in the region its slots begin."""

    @staticmethod
    def of(plan: Plan, device: str, phases: Mapping[str, int]) -> DeviceMemory:
        """The memory of `device` ("gpu0") when `phases` (name -> most tokens of a call) run."""
        chosen = [plan.phase(name) for name in phases]
        own = [step for phase in chosen for step in phase.steps if step.resource == device]
        known = {weight.name: weight for weight in plan.weights}
        weights = packed_bytes(known[name] for name in resident_names(chosen, device))
        begins: dict[str, int] = {}
        ends = [weights]
        arenas: dict[Kind, int] = {"decode": 0, "chunk": 0}
        results: dict[Kind, int] = {"decode": 0, "chunk": 0, "stream": 0}
        for phase in chosen:
            tokens = phases[phase.name]
            arena = phase.device_bytes.get(device, 0) * rank_rows(tokens, phase.ranks)
            kind = kind_of(phase)
            if kind == "stream":
                begins[phase.name] = start = 0 if evicts(phase, device) else aligned(weights)
                slots = [s.offset + s.bytes for s in phase.slots if s.device == device]
                at = phase.arena_at.get(device, 0)
                ends.append(start + max([at + arena, *slots]))
            else:
                arenas[kind] = max(arenas[kind], arena)
            rows = wanted_rows(plan, phase, tokens)
            mine = sum(size for _, size in result_bytes(phase, device, rows))
            results[kind] = max(results[kind], mine)
        return DeviceMemory(
            experts=placed_bytes(plan.placement, expert_bytes(plan)).get(device, 0),
            cache=_cache(plan) if device == HOME else 0,
            weights=weights,
            region=max(ends),
            arenas=arenas,
            scratch=SCRATCH
            + context_scratch(plan.kv, plan.limits.max_context)
            + PAGED_SCRATCH * any(map(paged, own)),
            results=results,
            begins=begins,
        )

    @property
    def beside(self) -> int:
        """Bytes of everything but the region."""
        activations = sum(self.arenas.values()) + sum(self.results.values())
        return self.experts + self.cache + activations + self.scratch


def _cache(plan: Plan) -> int:
    return sum(aligned(plan.kv.rows(layer, state) * state.bytes) for layer, state in plan.kv.each())
