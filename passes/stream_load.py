"""Streams every weight once through the GPUs while they compute: phase `prefill.stream`.

Contract
    * requires "plan"; establishes "streamed". Without a GPU budget, or with every expert resident,
      nothing changes
    * the whole prompt passes each layer once. Weights are read from the one host copy
    * ordinary tensors (attention, shared experts, routers) are loaded a sub-layer at a time into
      two alternating slots, one ahead; experts in groups into a ring of slots that crosses layers.
      A load waits for the OFF event of its slot (its last use), a use for the ON event (its load)
    * resident experts are computed where they are and never loaded
    * with R GPUs each rank holds 1/R of the tokens (zig-zag: of 2R pieces r and 2R - 1 - r). Latents
      are exchanged before attention; around the experts the unsorted rows are gathered, every
      rank routes all of them, computes its own experts and sends partial sums back: one gather and
      one exchange a layer, less than dispatch and combine while R <= top_k
    * `Plan.switches` says from which prompt length on the phase is the faster one

Method
    1. ring: a layer's experts, halved until the longest prompt's activations fit, down to 2
    2. walk the steps of `prefill.host`; emit for every rank loads, computation and exchanges
    3. tokens one call can take: what memory is left for activations
    4. switch-over: bisect the prompt length at which the cost model's timelines cross
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import ClassVar

import torch.fx

from hmc.cost import Call, CostModel
from hmc.passes.context import Budget, Context, ranges
from hmc.passes.kernel_choice import PREFILL
from hmc.passes.schedule import Part, Parts, Schedule, Value
from hmc.plan import LedgerItem, Phase, Plan, Step, Switch
from hmc.timeline import host_prefill, result_seconds, run
from hmc.verify import EXTERNAL, expert_ranges

STREAM = "prefill.stream"
_TURNS = 8
"""Groups that a ring is divided into: a load is long enough for full bandwidth, and the first one
short enough to start with."""
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
        ranks = len(budget.usable)
        if ranks > 1 and (plan.machine.rates is None or plan.machine.rates.link is None):
            context.decide(
                self.name, STREAM, "one GPU", "the machine declares no link rate between its GPUs"
            )
            ranks = 1
        memory = _Memory.of(plan, budget, ranks)
        phase = self._fitted(context, plan, memory, ranks)
        if phase is None:
            return
        peaks = [memory.peak(phase, rank, phase.max_tokens) for rank in range(ranks)]
        for rank, peak in enumerate(peaks):
            more = max(0, peak - memory.decode(rank))
            context.ledger.append(
                LedgerItem(
                    device=f"gpu{rank}",
                    kind="streaming",
                    bytes=more,
                    detail=f"{phase.name}: peak {peak / 1e9:.1f} GB"
                    + (", in part where dense weights were" if memory.evicts(rank) else ""),
                )
            )
        plan = plan.model_copy(update={"phases": (*plan.phases, phase)})
        context.plan = self._switched(context, plan, phase).model_copy(
            update={"ledger": tuple(context.ledger), "decisions": tuple(context.decisions)}
        )

    def _fitted(
        self, context: Context, plan: Plan, memory: _Memory, ranks: int
    ) -> Phase | None:
        """The phase with the longest ring that leaves room for the longest prompt."""
        size = max(memory.expert.values())
        streamed = max(len(_streamed(plan, layer, 0, ranks)) for layer in memory.expert)
        wanted = plan.limits.max_context
        ring = max(2, min(streamed, memory.spare(ranks) // size))
        while True:
            group = max(1, ring // _TURNS)
            phase = _Emitter(context.bases[PREFILL], plan, memory, ranks, ring, group).emit()
            tokens = min(memory.tokens(phase, rank, ring, group, plan) for rank in range(ranks))
            if tokens >= wanted or ring <= 2:
                break
            ring = max(2, ring // 2)
        if tokens < plan.limits.max_chunk:
            context.decide(
                self.name,
                STREAM,
                "not emitted",
                f"a ring of 2 experts leaves room for a prompt of {tokens} tokens",
            )
            return None
        tokens = min(tokens, max(wanted, plan.limits.max_chunk))
        context.decide(
            self.name,
            f"ring of {STREAM}",
            f"{ring} of the {streamed} experts a layer streams to each GPU,"
            f" {ring * size / 1e9:.1f} GB in loads of {group}",
            f"prompts up to {tokens} tokens fit beside it ({wanted} wanted);"
            f" {memory.reason(ranks)}",
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

    `window` are two slots for each kind of sub-layer; `dense` stays on gpu0 where there is room for
    it beside a full ring, else it is streamed like on the other ranks.
    """

    budget: Budget
    residents: tuple[int, ...]
    window: int
    expert: dict[int, int]
    keep_dense: bool

    @staticmethod
    def of(plan: Plan, budget: Budget, ranks: int) -> _Memory:
        expert: dict[int, int] = {}
        for each in plan.experts:
            expert[each.layer] = expert.get(each.layer, 0) + each.bytes + each.scale_bytes
        residents = [0] * ranks
        for placement in plan.placement:
            for rank in range(ranks):
                held = expert_ranges(placement.tiers.get(f"gpu{rank}", ""))
                residents[rank] += len(held) * expert[placement.layer]
        sections: dict[str, int] = {}
        for (layer, part), names in _sections(plan.phase(PREFILL)).items():
            if layer >= 0:
                size = sum(_sizes(plan)[name] for name in names)
                sections[part] = max(sections.get(part, 0), size)
        window = 2 * sum(sections.values())
        room = budget.usable[0] - budget.dense - budget.cache - residents[0] - budget.workspace
        keep = room >= budget.ring + plan.limits.max_context // ranks * 300_000
        return _Memory(budget, tuple(residents), window, expert, keep)

    def evicts(self, rank: int) -> bool:
        """Whether dense weights leave the GPU while a prompt streams."""
        return rank == 0 and not self.keep_dense

    def streams_dense(self, rank: int) -> bool:
        """Whether a rank loads the dense weights layer by layer."""
        return rank > 0 or not self.keep_dense

    def decode(self, rank: int) -> int:
        """Bytes in use between prompts."""
        dense = self.budget.dense + self.budget.cache if rank == 0 else 0
        return dense + self.residents[rank] + self.budget.workspace

    def fixed(self, rank: int) -> int:
        """Bytes in use while a prompt streams, beside ring and activations."""
        cache = self.budget.cache if rank == 0 else 0
        dense = self.window if self.streams_dense(rank) else self.budget.dense
        return cache + dense + self.residents[rank] + self.budget.workspace

    def spare(self, ranks: int) -> int:
        """Bytes of the smallest rank beside what is fixed."""
        return min(self.budget.usable[rank] - self.fixed(rank) for rank in range(ranks))

    def per_token(self, phase: Phase, rank: int, group: int, plan: Plan) -> int:
        """Bytes one token of the call takes on a rank: its share of the arena, and the rows of one
        group of experts (gathered bf16 in, gate * up, f32 out), more than evenly many."""
        step = next(step for step in phase.steps if step.op == "experts")
        hidden, inner = int(step.attrs["k"]), int(step.attrs["n"])
        rows = plan.model.top_k * group / plan.model.experts * _SPREAD
        arena = phase.device_bytes.get(f"gpu{rank}", 0) / phase.ranks
        return int(arena + rows * (6 * hidden + 4 * inner))

    def tokens(self, phase: Phase, rank: int, ring: int, group: int, plan: Plan) -> int:
        """Prompt tokens one call can take."""
        free = self.budget.usable[rank] - self.fixed(rank) - ring * max(self.expert.values())
        return max(0, free) // self.per_token(phase, rank, group, plan)

    def peak(self, phase: Phase, rank: int, tokens: int) -> int:
        """Bytes of a rank during a call of `tokens` tokens."""
        slots = sum(s.bytes for s in phase.slots if s.device == f"gpu{rank}" and "ring" in s.name)
        share = phase.device_bytes.get(f"gpu{rank}", 0) * -(-tokens // phase.ranks)
        return self.fixed(rank) + slots + share

    def reason(self, ranks: int) -> str:
        """What else is on the GPUs."""
        parts = [
            f"gpu{rank} has {self.fixed(rank) / 1e9:.1f} of {self.budget.usable[rank] / 1e9:.1f} GB"
            f" in use otherwise{' (dense weights streamed)' if self.streams_dense(rank) else ''}"
            for rank in range(ranks)
        ]
        return "; ".join(parts)


def _sizes(plan: Plan) -> dict[str, int]:
    return {weight.name: weight.bytes + weight.scale_bytes for weight in plan.weights}


def _sections(phase: Phase) -> dict[tuple[int, str], list[str]]:
    """Dense weights by (layer, "attention" or "mlp"): a layer's steps up to the matmul after its
    attention, and the rest; embedding and experts are not among them."""
    found: dict[tuple[int, str], list[str]] = {}
    for section, step in _walk(phase.steps):
        if step.op not in ("embed", "experts"):
            found.setdefault(section, []).extend(
                name for name in step.weights.values() if name not in found.get(section, ())
            )
    return found


def _walk(steps: Iterable[Step]) -> Iterable[tuple[tuple[int, str], Step]]:
    layer, part, attended = -2, "attention", False
    for step in steps:
        if step.op in ("copy",):
            continue
        if step.layer != layer:
            layer, part, attended = step.layer, "attention", False
        elif part == "attention" and attended and step.op != "linear":
            part = "mlp"
        attended |= step.op in ("mla", "attention")
        yield (layer, part), step


def _streamed(plan: Plan, layer: int, rank: int, ranks: int) -> list[int]:
    """Experts of a layer that a rank streams: its share of those that no GPU of the phase holds."""
    tiers = next(each.tiers for each in plan.placement if each.layer == layer)
    away = [
        expert
        for tier, text in tiers.items()
        if tier == "host" or int(tier[3:]) >= ranks
        for expert in expert_ranges(text)
    ]
    away.sort()
    return away[len(away) * rank // ranks : len(away) * (rank + 1) // ranks]


@dataclass
class _Emitter:
    """Emits one streamed phase; see the module's docstring."""

    base: Phase
    plan: Plan
    memory: _Memory
    ranks: int
    ring: int
    group: int
    schedule: Schedule = field(default_factory=lambda: Schedule(STREAM))
    _values: list[dict[str, Value]] = field(default_factory=list)
    _gathered: dict[tuple[Value, int, int], list[Part]] = field(default_factory=dict)
    _turns: list[int] = field(default_factory=list)
    _loaded: list[dict[tuple[int, str], str]] = field(default_factory=list)

    def emit(self) -> Phase:
        self._values = [{} for _ in range(self.ranks)]
        self._turns = [0] * self.ranks
        self._loaded = [{} for _ in range(self.ranks)]
        self._buffers = {buffer.name: buffer for buffer in self.base.buffers}
        self._tiers = {each.layer: each.tiers for each in self.plan.placement}
        self._sections = _sections(self.base)
        self._size = _sizes(self.plan)
        routers = {step.inputs["logits"].buffer for step in self.base.steps if step.op == "route"}
        for section, step in _walk(self.base.steps):
            if step.op == "experts":
                self._experts(step)
            elif step.op in ("mla", "attention"):
                self._attention(section, step)
            elif step.op == "route" or any(o.buffer in routers for o in step.outputs.values()):
                self._everywhere(section, step)
            elif step.layer < 0 and step.op != "embed":
                self._plain(section, step, 0, {})  # rank 0 holds the prompt's last token
            else:
                for rank in range(self.ranks):
                    self._plain(section, step, rank, self._share())
        self._finish()
        return self.schedule.finish(
            self.plan.limits.max_context, ranks=self.ranks, ring=self.ring
        )

    def _share(self) -> dict[str, int | float | str]:
        return {"ranks": self.ranks} if self.ranks > 1 else {}

    def _name(self, name: str, rank: int) -> str:
        return name if self.ranks == 1 else f"r{rank}.{name}"

    # -- values ------------------------------------------------------------------------------------

    def _value(self, buffer: str, rank: int) -> Value:
        found = self._values[rank].get(buffer)
        if found is None:
            about = self._buffers[buffer]
            assert about.offset == EXTERNAL
            found = Value(self._name(buffer, rank), about.dtype, about.width, external=True)
            self._values[rank][buffer] = found
        return found

    def _inputs(self, step: Step, rank: int) -> dict[str, Part]:
        return {
            role: Part(self._value(operand.buffer, rank), operand.column, operand.width)
            for role, operand in step.inputs.items()
        }

    def _outputs(self, step: Step, rank: int, device: str, rows: int = 1) -> dict[str, Part]:
        result = {}
        for role, operand in step.outputs.items():
            known = self._values[rank].get(operand.buffer)
            if known is None:
                about = self._buffers[operand.buffer]
                outside = about.offset == EXTERNAL  # logits: of the rows wanted, not of all
                name = self._name(about.name, rank) + (".device" if outside else "")
                known = Value(name, about.dtype, about.width, device, outside, rows)
                self._values[rank][operand.buffer] = known
            result[role] = Part(known, operand.column, operand.width)
        return result

    # -- steps -------------------------------------------------------------------------------------

    def _add(
        self,
        step: Step,
        rank: int,
        inputs: Parts,
        outputs: Parts,
        attrs: dict[str, int | float | str],
        uses: tuple[str, ...] = (),
        resource: str = "",
    ) -> None:
        resource = resource or f"gpu{rank}"
        self.schedule.add(
            step.op,
            resource,
            inputs,
            outputs,
            layer=step.layer,
            weights=step.weights,
            attrs={**step.attrs, **attrs},
            kernels=step.kernels if resource == "cpu" else (f"torch:{step.op}",),
            weight_bytes=step.weight_bytes,
            flops=step.flops,
            uses=uses,
        )

    def _plain(
        self, section: tuple[int, str], step: Step, rank: int, attrs: dict[str, int | float | str]
    ) -> None:
        if step.op == "embed":
            inputs, outputs = self._inputs(step, rank), self._outputs(step, rank, "host")
            self._add(step, rank, inputs, outputs, attrs, resource="cpu")
            (name,) = (operand.buffer for operand in step.outputs.values())
            value = self._values[rank][name]
            moved = Value(f"{value.name}.gpu{rank}", value.dtype, value.width, f"gpu{rank}")
            self._copy(f"h2d{rank}", value, moved, attrs, step.layer)
            self._values[rank][name] = moved
            return
        uses = self._slots(section, step, rank)
        outputs = self._outputs(step, rank, f"gpu{rank}")
        self._add(step, rank, self._inputs(step, rank), outputs, attrs, uses)
        for role, operand in step.outputs.items():
            if operand.buffer == "logits":
                value = outputs[role].value
                out = Value("logits", value.dtype, value.width, external=True)
                self._copy(f"d2h{rank}", value, out, {}, step.layer)

    def _copy(
        self,
        resource: str,
        source: Value,
        target: Value,
        attrs: dict[str, int | float | str],
        layer: int,
    ) -> None:
        # the embedding's copy moves every row; that of logits only those wanted
        self.schedule.add(
            "copy",
            resource,
            {"y": Part.all(source)},
            {"y": Part.all(target)},
            layer=max(layer, 0) if resource.startswith("h2d") else layer,
            attrs=attrs,
            kernels=("torch:copy",),
        )

    def _attention(self, section: tuple[int, str], step: Step) -> None:
        """Attention of each rank's queries over the latents (or keys and values) of all, and the
        way of the new cache rows to the host."""
        roles = [role for role in ("latent", "k_rope", "k", "v") if role in step.inputs]
        every = {role: self._gather(step, role) for role in roles}
        for rank in range(self.ranks):
            inputs = self._inputs(step, rank) | {role: every[role][rank] for role in roles}
            uses = self._slots(section, step, rank)
            self._add(
                step, rank, inputs, self._outputs(step, rank, f"gpu{rank}"), self._share(), uses
            )
        self.schedule.add(
            "kv_out",
            "d2h0",
            {role: every[role][0] for role in roles},
            {},
            layer=step.layer,
            kernels=("torch:copy",),
        )

    def _gather(self, step: Step, role: str) -> list[Part]:
        """The rows of all ranks of one input, on every rank; once for all readers."""
        operand = step.inputs[role]
        mine = [Part(self._value(operand.buffer, r), operand.column, operand.width) for r in range(self.ranks)]
        if self.ranks == 1 or mine[0].value.rows > 1:
            return mine
        key = (mine[0].value, mine[0].column, mine[0].width)
        if key not in self._gathered:
            values = [
                Value(f"{part.value.name}.{role}.all", "bf16", part.width, f"gpu{r}", rows=self.ranks)
                for r, part in enumerate(mine)
            ]
            self._link("all_gather", step.layer, mine, [Part.all(value) for value in values])
            self._gathered[key] = [Part.all(value) for value in values]
        return self._gathered[key]

    def _link(self, op: str, layer: int, inputs: list[Part], outputs: list[Part]) -> None:
        self.schedule.add(
            op,
            "link",
            {f"x{rank}": part for rank, part in enumerate(inputs)},
            {f"y{rank}": part for rank, part in enumerate(outputs)},
            layer=layer,
            attrs={"bytes": 2 * inputs[0].width},
            kernels=(f"torch:{op}",),
        )

    def _everywhere(self, section: tuple[int, str], step: Step) -> None:
        """Gating: every rank does it for all tokens, so that nothing sorted has to travel."""
        for role in step.inputs:
            if step.op != "route":
                self._gather(step, role)
        for rank in range(self.ranks):
            inputs = {role: self._gather(step, role)[rank] for role in step.inputs}
            uses = self._slots(section, step, rank)
            outputs = self._outputs(step, rank, f"gpu{rank}", rows=self.ranks)
            self._add(step, rank, inputs, outputs, {}, uses)

    def _experts(self, step: Step) -> None:
        parts = []
        for rank in range(self.ranks):
            x = self._gather(step, "x")[rank]
            inputs = self._inputs(step, rank) | {"x": x}
            order = Value(
                self._name(f"layers_{step.layer}_order", rank),
                "i32",
                int(step.attrs["top_k"]),
                f"gpu{rank}",
                rows=self.ranks,
            )
            self.schedule.add(
                "sort",
                f"gpu{rank}",
                {"ids": inputs["ids"]},
                {"order": Part.all(order)},
                layer=step.layer,
                kernels=("torch:sort",),
            )
            inputs["order"] = Part.all(order)
            y = Value(
                self._name(step.outputs["y"].buffer, rank),
                "f32",
                step.outputs["y"].width,
                f"gpu{rank}",
                rows=self.ranks,
            )
            held = expert_ranges(self._tiers[step.layer].get(f"gpu{rank}", ""))
            if held:
                self._add(step, rank, inputs, {"y": Part.all(y)}, _some(held))
            away = _streamed(self.plan, step.layer, rank, self.ranks)
            for first in range(0, len(away), self.group):
                turn = away[first : first + self.group]
                slot = self._load_experts(step, rank, turn)
                self._add(step, rank, inputs, {"y": Part.all(y)}, _some(turn), (slot,))
            parts.append(y)
        buffer = step.outputs["y"].buffer
        if self.ranks == 1:
            self._values[0][buffer] = parts[0]
            return
        sums = [
            Value(f"{part.name}.own", "f32", part.width, f"gpu{rank}")
            for rank, part in enumerate(parts)
        ]
        self._link(
            "exchange", step.layer, [Part.all(p) for p in parts], [Part.all(s) for s in sums]
        )
        for rank, value in enumerate(sums):
            self._values[rank][buffer] = value

    # -- loads -------------------------------------------------------------------------------------

    def _load_experts(self, step: Step, rank: int, turn: list[int]) -> str:
        size = self.memory.expert[step.layer]
        turns = max(2, self.ring // self.group)
        slot = self.schedule.slot(
            f"ring{rank}.{self._turns[rank] % turns}", f"gpu{rank}", size * self.group
        )
        self._turns[rank] += 1
        self.schedule.add(
            "load",
            f"h2d{rank}",
            {},
            {},
            layer=step.layer,
            weights=step.weights,
            attrs=_some(turn),
            kernels=("torch:copy",),
            weight_bytes=size * len(turn),
            fills=(slot,),
        )
        return slot

    def _slots(self, section: tuple[int, str], step: Step, rank: int) -> tuple[str, ...]:
        """The slot of a dense step's weights, loaded at the section's first step; none where they
        are resident."""
        if not step.weights or not self.memory.streams_dense(rank):
            return ()
        if section not in self._loaded[rank]:
            layer, part = section
            names = self._sections[section]
            size = sum(self._size[name] for name in names)
            side = f"{part}{rank}.{layer % 2}" if layer >= 0 else f"head{rank}"
            slot = self.schedule.slot(side, f"gpu{rank}", size)
            self.schedule.add(
                "load",
                f"h2d{rank}",
                {},
                {},
                layer=layer,
                weights={str(number): name for number, name in enumerate(names)},
                kernels=("torch:copy",),
                weight_bytes=size,
                fills=(slot,),
            )
            self._loaded[rank][section] = slot
        return (self._loaded[rank][section],)

    def _finish(self) -> None:
        """Put gpu0's dense weights back where the slots were."""
        if not self.memory.evicts(0):
            return
        slots = tuple(name for name in self.schedule.slots_of("gpu0"))
        whole = self.schedule.slot("dense0", "gpu0", self.memory.budget.dense)
        self.schedule.add(
            "load",
            "h2d0",
            {},
            {},
            attrs={"what": "dense weights of decode, over the slots"},
            kernels=("torch:copy",),
            weight_bytes=self.memory.budget.dense,
            fills=(whole, *slots),
        )


def _some(experts: list[int]) -> dict[str, int | float | str]:
    return {"range": ranges(experts), "count": len(experts)}
