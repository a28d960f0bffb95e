"""Streams every weight once through the GPUs while they compute: phase `prefill.stream`.

Contract
    * requires "plan"; establishes "streamed". Without a GPU budget, or with every expert resident,
      nothing changes
    * the whole prompt passes each layer once. Weights are read from the one host copy
    * ordinary tensors (attention, shared experts, routers) are loaded a sub-layer at a time into
      two alternating slots, one ahead; experts in groups into a ring of slots that crosses layers.
      A load waits for the OFF event of its slot (its last use), a use for the ON event (its load)
    * resident experts are computed where they are and never loaded
    * with R GPUs each rank holds 1/R of the tokens (zig-zag: of 2R pieces r and 2R - 1 - r).
      Latents are exchanged before attention; around the experts the unsorted rows are gathered,
      every rank routes all of them, computes its own experts and sends partial sums back: one
      gather and one exchange a layer, less than dispatch and combine while R <= top_k
    * with several GPUs also phase `prefill.beside`: the same through the last GPU alone, whose new
      cache rows go to gpu0 by way of the host, so that gpu0 and the CPU decode meanwhile
    * `Plan.switches` says from which prompt length on the phase is the faster one

Method
    1. ring: as asked for; else a layer's experts, halved until the longest prompt's activations
       fit, down to 2
    2. walk the steps of `prefill.host`; emit for every rank loads, computation and exchanges
    3. tokens one call can take: what memory is left for activations
    4. switch-over: bisect the prompt length at which the cost model's timelines cross
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.cost import Call, CostModel
from hmc.passes.context import Budget, Context
from hmc.passes.kernel_choice import PREFILL
from hmc.passes.schedule import Schedule
from hmc.passes.stream_emit import (
    BESIDE,
    STREAM,
    StreamEmitter,
    dense_sections,
    streamed_experts,
    weight_sizes,
)
from hmc.plan import LedgerItem, Phase, Plan, Switch
from hmc.timeline import host_prefill, result_seconds, run
from hmc.verify import expert_ranges

_TURNS = 8
"""Groups that a ring is divided into: a load is long enough for full bandwidth, and the first one
short enough to start with."""
_TOKEN = 300_000
"""Activation bytes of a token, roughly, before they are laid out."""
_SPREAD = 1.5
"""How much more than the average a group of experts may be asked for by one prompt."""


@dataclass(frozen=True)
class StreamLoad:
    """Adds `prefill.stream` to `context.plan`, and its switch-over point."""

    name: ClassVar[str] = "stream_load"
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    establishes: ClassVar[frozenset[str]] = frozenset({"streamed"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        plan, budget = context.plan, context.budget
        assert plan is not None
        hosted = any("host" in placement.tiers for placement in plan.placement)
        if budget is None or not hosted:
            return
        gpus = tuple(range(len(budget.usable)))
        beside = gpus[-1:]  # streams a prompt while gpu0 decodes
        if len(gpus) > 1 and (plan.machine.rates is None or plan.machine.rates.link is None):
            context.decide(
                self.name, STREAM, "one GPU", "the machine declares no link rate between its GPUs"
            )
            gpus = gpus[:1]
        memory = _Memory.of(plan, budget, gpus)
        phase = self._fitted(context, plan, memory, STREAM)
        if phase is None:
            return
        phases, peaks = [phase], memory.peaks(phase)
        if beside != (0,):
            alone = _Memory.of(plan, budget, beside)
            second = self._fitted(context, plan, alone, BESIDE)
            if second is not None:
                phases.append(second)
                for gpu, peak in alone.peaks(second).items():
                    peaks[gpu] = max(peak, peaks.get(gpu, 0))
        for gpu, peak in sorted(peaks.items()):
            more = max(0, peak - memory.decode(gpu))
            names = " and ".join(each.name for each in phases)
            context.ledger.append(
                LedgerItem(
                    device=f"gpu{gpu}",
                    kind="streaming",
                    bytes=more,
                    detail=f"{names}: peak {peak / 1e9:.1f} GB"
                    + (", in part where dense weights were" if memory.evicts and not gpu else ""),
                )
            )
        plan = plan.model_copy(update={"phases": (*plan.phases, *phases)})
        context.plan = self._switched(context, plan, phase).model_copy(
            update={"ledger": tuple(context.ledger), "decisions": tuple(context.decisions)}
        )

    def _fitted(self, context: Context, plan: Plan, memory: _Memory, name: str) -> Phase | None:
        """The phase with the longest ring with which the longest prompt takes as few calls as with
        the shortest."""
        size = max(memory.expert.values())
        gpus = memory.gpus
        streamed = max(len(streamed_experts(plan, layer, 0, gpus)) for layer in memory.expert)
        wanted = plan.limits.max_context
        asked = min(context.options.ring, streamed)
        longest = asked or streamed
        while longest > 2 and longest * size > memory.spare():
            longest = max(2, longest // 2)

        def emit(ring: int) -> Phase:
            return StreamEmitter(
                context.bases[PREFILL],
                plan,
                memory.expert,
                tuple(memory.streams_dense(gpu) for gpu in gpus),
                memory.budget.dense if memory.evicts else 0,
                gpus,
                ring,
                max(1, ring // _TURNS),
                Schedule(name),
            ).emit()

        phase = emit(longest)

        def fits(ring: int) -> int:
            group = max(1, ring // _TURNS)
            return min(memory.tokens(phase, gpu, ring, group, plan) for gpu in gpus)

        calls = -(-wanted // max(1, fits(2)))
        ring = longest
        while not asked and ring > 2 and wanted > calls * fits(ring):
            ring = max(2, ring // 2)
        if ring != longest:
            phase = emit(ring)
        tokens, group = fits(ring), max(1, ring // _TURNS)
        if tokens < plan.limits.max_chunk:
            context.decide(
                self.name,
                name,
                "not emitted",
                f"a ring of 2 experts leaves room for a prompt of {tokens} tokens",
            )
            return None
        tokens = min(tokens, max(wanted, plan.limits.max_chunk))
        each = "each GPU" if len(gpus) > 1 else f"gpu{gpus[0]}"
        context.decide(
            self.name,
            f"ring of {name}",
            f"{ring} of the {streamed} experts a layer streams to {each},"
            f" {ring * size / 1e9:.1f} GB in loads of {group}",
            f"prompts up to {tokens} tokens fit beside it ({wanted} wanted); {memory.reason()}",
        )
        return phase.model_copy(update={"max_tokens": tokens})

    def _switched(self, context: Context, plan: Plan, phase: Phase) -> Plan:
        """The plan with the prompt length from which on streaming is faster."""
        model = CostModel(plan)
        host = plan.phase(PREFILL)
        # a chunk's time grows linearly with the context before it: two points tell the rest
        far = max(plan.limits.max_context, 2 * host.max_tokens)
        low, high = (
            result_seconds(host, run(host, Call(host.max_tokens, at), model)) for at in (0, far)
        )

        def on_host(tokens: int) -> float:
            return sum(
                (low + (high - low) * call.context / far) * call.tokens / host.max_tokens
                for call in host_prefill(host, tokens, model)
            )

        def streamed(tokens: int) -> float:
            return result_seconds(phase, run(phase, Call(tokens), model)) + prefill_seconds(plan)

        first, last = 0, phase.max_tokens // 64
        if streamed(last * 64) >= on_host(last * 64):
            context.decide(
                self.name,
                "switch-over",
                f"{PREFILL} for every prompt",
                f"at {last * 64} tokens streaming takes {streamed(last * 64):.2f} s, the host"
                f" {on_host(last * 64):.2f} s",
            )
            return plan
        while last - first > 1:
            middle = (first + last) // 2
            if streamed(middle * 64) < on_host(middle * 64):
                last = middle
            else:
                first = middle
        tokens = last * 64
        context.decide(
            self.name,
            "switch-over",
            f"{STREAM} from {tokens} prompt tokens on",
            f"streaming takes {streamed(tokens):.2f} s there and {PREFILL} {on_host(tokens):.2f} s;"
            f" at twice the length {streamed(min(2 * tokens, phase.max_tokens)):.2f} s and"
            f" {on_host(min(2 * tokens, phase.max_tokens)):.2f} s",
        )
        switches = (
            Switch(kind="prefill", phase=PREFILL, tokens=1),
            Switch(kind="prefill", phase=STREAM, tokens=tokens),
        )
        return plan.model_copy(update={"switches": (*plan.switches, *switches)})


def prefill_seconds(plan: Plan) -> float:
    """What the machine adds to every streamed prefill."""
    rates = plan.machine.rates
    return 0.0 if rates is None or rates.prefill is None else rates.prefill.value


@dataclass(frozen=True)
class _Memory:
    """Bytes of each GPU beside the ring: what stays resident, and sub-layer windows.

    `gpus` are those of a streamed phase; `window` are two slots for each kind of sub-layer; dense
    weights stay on gpu0 (`keep_dense`) where there is room for them beside a full ring, else they
    are streamed like on the others.
    """

    budget: Budget
    gpus: tuple[int, ...]
    residents: tuple[int, ...]
    window: int
    expert: dict[int, int]
    keep_dense: bool

    @staticmethod
    def of(plan: Plan, budget: Budget, gpus: tuple[int, ...]) -> _Memory:
        expert: dict[int, int] = {}
        for each in plan.experts:
            expert[each.layer] = expert.get(each.layer, 0) + each.bytes + each.scale_bytes
        residents = [0] * len(budget.usable)
        for placement in plan.placement:
            for gpu in range(len(residents)):
                held = expert_ranges(placement.tiers.get(f"gpu{gpu}", ""))
                residents[gpu] += len(held) * expert[placement.layer]
        sections: dict[str, int] = {}
        sizes = weight_sizes(plan)
        for (layer, part), names in dense_sections(plan.phase(PREFILL)).items():
            if layer >= 0:
                size = sum(sizes[name] for name in names)
                sections[part] = max(sections.get(part, 0), size)
        window = 2 * sum(sections.values())
        room = budget.usable[0] - budget.dense - budget.cache - residents[0] - budget.workspace
        layer = max(expert.values()) * plan.model.experts // len(gpus)
        keep = room >= layer + plan.limits.max_context // len(gpus) * _TOKEN
        return _Memory(budget, gpus, tuple(residents), window, expert, keep)

    @property
    def evicts(self) -> bool:
        """Whether gpu0's dense weights leave it while a prompt streams."""
        return 0 in self.gpus and not self.keep_dense

    def streams_dense(self, gpu: int) -> bool:
        """Whether a GPU loads the dense weights layer by layer."""
        return gpu > 0 or not self.keep_dense

    def decode(self, gpu: int) -> int:
        """Bytes in use between prompts."""
        dense = self.budget.dense + self.budget.cache if gpu == 0 else 0
        return dense + self.residents[gpu] + self.budget.workspace

    def fixed(self, gpu: int) -> int:
        """Bytes in use while a prompt streams, beside ring and activations."""
        cache = self.budget.cache if gpu == 0 else 0
        dense = self.window if self.streams_dense(gpu) else self.budget.dense
        return cache + dense + self.residents[gpu] + self.budget.workspace

    def spare(self) -> int:
        """Bytes of the fullest GPU beside what is fixed."""
        return min(self.budget.usable[gpu] - self.fixed(gpu) for gpu in self.gpus)

    def per_token(self, phase: Phase, gpu: int, group: int, plan: Plan) -> int:
        """Bytes one token of the call takes on a GPU: its share of the arena, and the rows of one
        group of experts (gathered bf16 in, gate * up, f32 out), more than evenly many."""
        step = next(step for step in phase.steps if step.op == "experts")
        hidden, inner = int(step.attrs["k"]), int(step.attrs["n"])
        rows = plan.model.top_k * group / plan.model.experts * _SPREAD
        arena = phase.device_bytes.get(f"gpu{gpu}", 0) / phase.ranks
        return int(arena + rows * (6 * hidden + 4 * inner))

    def tokens(self, phase: Phase, gpu: int, ring: int, group: int, plan: Plan) -> int:
        """Prompt tokens one call can take."""
        free = self.budget.usable[gpu] - self.fixed(gpu) - ring * max(self.expert.values())
        return max(0, free) // self.per_token(phase, gpu, group, plan)

    def peaks(self, phase: Phase) -> dict[int, int]:
        """Bytes of each GPU of the phase during a call of `max_tokens` tokens."""
        return {gpu: self._peak(phase, gpu) for gpu in self.gpus}

    def _peak(self, phase: Phase, gpu: int) -> int:
        slots = sum(s.bytes for s in phase.slots if s.device == f"gpu{gpu}" and "ring" in s.name)
        share = phase.device_bytes.get(f"gpu{gpu}", 0) * -(-phase.max_tokens // phase.ranks)
        return self.fixed(gpu) + slots + share

    def reason(self) -> str:
        """What else is on the GPUs."""
        parts = [
            f"gpu{gpu} has {self.fixed(gpu) / 1e9:.1f} of {self.budget.usable[gpu] / 1e9:.1f} GB"
            f" in use otherwise{' (dense weights streamed)' if self.streams_dense(gpu) else ''}"
            for gpu in self.gpus
        ]
        return "; ".join(parts)
