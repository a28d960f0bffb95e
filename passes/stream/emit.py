"""Emits the steps of `prefill.stream`: loads, computation and exchanges of every rank, in program
order. What is streamed, and how much, is decided in `load.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from hmc.ops import OPS
from hmc.passes.emit.builder import Lies, Schedule
from hmc.passes.emit.values import Attrs, Bound, Part, Parts, Value
from hmc.plan import DType, Phase, Plan, Step
from hmc.plan.memory import (
    HOME,
    expert_bytes,
    packed_bytes,
    resident_names,
    stored_expert_bytes,
)
from hmc.plan.phases import STREAM
from hmc.ranges import expert_ranges, ranges

_TURNS = 8
"""Loads that a ring is divided into: each is long enough for full bandwidth, and the first one
short enough to start with."""


def ring_turns(ring: int) -> tuple[int, int]:
    """Experts of one load into a ring of `ring` experts, and the slots that makes."""
    group = max(1, ring // _TURNS)
    return group, max(2, ring // group)


def dense_sections(phase: Phase) -> dict[tuple[int, str], list[str]]:
    """Dense weights by (layer, section), in the order in which they are read; the embedding and
    experts are not among them."""
    found: dict[tuple[int, str], list[str]] = {}
    for step in phase.steps:
        if not (OPS[step.op].routed or OPS[step.op].where == "host"):
            names = found.setdefault((step.layer, step.section), [])
            names.extend(name for name in step.weights.values() if name not in names)
    return found


def streamed_experts(plan: Plan, layer: int, rank: int, gpus: tuple[int, ...]) -> list[int]:
    """Experts of a layer that a rank streams: its share of those that none of `gpus`, the GPU of
    each rank, holds."""
    tiers = next(each.tiers for each in plan.placement if each.layer == layer)
    away = [
        expert
        for tier, text in tiers.items()
        if tier == "host" or int(tier[3:]) not in gpus
        for expert in expert_ranges(text)
    ]
    away.sort()
    ranks = len(gpus)
    return away[len(away) * rank // ranks : len(away) * (rank + 1) // ranks]


@dataclass
class StreamEmitter:
    """Emits one streamed phase, rank r on GPU `gpus[r]`, with a ring of `ring` experts.

    With `chosen`, of routed experts only those are loaded that some token of the call chose.
    `streams_dense` by rank: whether dense weights are loaded too. Where they leave gpu0 for that
    they are brought back at the end.
    """

    base: Phase
    plan: Plan
    streams_dense: tuple[bool, ...]
    gpus: tuple[int, ...]
    ring: int = 2
    name: str = STREAM
    chosen: bool = False

    @property
    def ranks(self) -> int:
        """GPUs that share the prompt."""
        return len(self.gpus)

    def emit(self) -> Phase:
        self.schedule = Schedule(self.name)
        self._names = [f"gpu{gpu}" for gpu in self.gpus]
        self._bound = [
            Bound(self.base, "" if self.ranks == 1 else f"r{rank}.") for rank in range(self.ranks)
        ]
        self._gathered: dict[Part, list[Part]] = {}
        self._turns = [0] * self.ranks
        self._loaded: list[dict[tuple[int, str], str]] = [{} for _ in range(self.ranks)]
        self._tiers = {each.layer: each.tiers for each in self.plan.placement}
        self._sections = dense_sections(self.base)
        self._weights = {weight.name: weight for weight in self.plan.weights}
        self._stored = stored_expert_bytes(self.plan)
        self._held = expert_bytes(self.plan)
        share: Attrs = {"ranks": self.ranks} if self.ranks > 1 else {}
        for step in self.base.steps:
            row = OPS[step.op]
            if row.routed:
                self._experts(step)
            elif row.attends and not row.alone and _rows_of_all(step):
                self._attention(step, share)
            elif row.everywhere or "router" in step.attrs:
                self._everywhere(step)
            elif row.where == "host":
                self._host(step, share)
            elif step.section == "head":  # rank 0 holds the prompt's last token
                self._plain(step, 0, self._bound[0].inputs(step), {})
            else:
                for rank, bound in enumerate(self._bound):
                    self._plain(step, rank, bound.inputs(step), share)
        self._finish()
        return self.schedule.finish(self.plan.limits.max_context, ranks=self.ranks, ring=self.ring)

    def _new(self, name: str, rank: int, dtype: DType, width: int, rows: int = 1) -> Part:
        """All of a value that no step of the base phase writes, on a rank's GPU."""
        return Part.all(Value(name, dtype, width, self._names[rank], rows=rows))

    # -- steps -------------------------------------------------------------------------------------

    def _plain(self, step: Step, rank: int, inputs: Parts, attrs: Attrs, rows: int = 1) -> None:
        """A step of a rank, with its weights in a slot or resident; logits go to the host."""
        uses = self._slots(step, rank)
        outputs = self._bound[rank].outputs(step, self._names[rank], rows)
        self.schedule.again(step, self._names[rank], inputs, outputs, attrs, uses=uses)
        for part in outputs.values():
            if part.value.external:
                out = replace(part.value, name="logits", device="host")
                self._copy(f"d2h{self.gpus[rank]}", part.value, out, {}, step)

    def _host(self, step: Step, attrs: Attrs) -> None:
        """A step that stays on the host, whose result goes to each rank."""
        for rank, bound in enumerate(self._bound):
            inputs, outputs = bound.inputs(step), bound.outputs(step, "host")
            self.schedule.again(step, "cpu", inputs, outputs, attrs)
            for role, operand in step.outputs.items():
                value, device = outputs[role].value, self._names[rank]
                moved = replace(value, name=f"{value.name}.{device}", device=device)
                self._copy(f"h2d{self.gpus[rank]}", value, moved, attrs, step)
                bound.values[operand.buffer] = moved

    def _copy(self, resource: str, source: Value, target: Value, attrs: Attrs, step: Step) -> None:
        operands = {"y": Part.all(source)}, {"y": Part.all(target)}
        where: dict[str, Any] = {"layer": step.layer, "section": step.section}
        self.schedule.add("copy", resource, *operands, attrs=attrs, **where)

    def _attention(self, step: Step, attrs: Attrs) -> None:
        """Attention of each rank's queries over the latents (or keys and values) of all, whose new
        cache rows go to the host."""
        roles = _rows_of_all(step)
        every = {role: self._gather(step, role) for role in roles}
        for rank, bound in enumerate(self._bound):
            inputs = bound.inputs(step) | {role: every[role][rank] for role in roles}
            self._plain(step, rank, inputs, attrs)
        if OPS[step.op].pages(step.attrs):  # else an earlier layer's step does
            self._hand_over({role: every[role][0] for role in roles}, step.layer)

    def _hand_over(self, rows: Parts, layer: int) -> None:
        """New cache rows to the host, whose CPU puts them into its pages, and from there to gpu0,
        which decodes, where it is no rank of this phase."""
        first = self.gpus[0]
        held = {
            role: Part.all(Value(f"layers_{layer}_{role}.new", part.value.dtype, part.width))
            for role, part in rows.items()
        }
        self.schedule.add("copy", f"d2h{first}", rows, held, layer=layer)
        self.schedule.add("kv_out", "cpu", held, {}, layer=layer)
        if first:
            self.schedule.add("kv_in", "h2d0", held, {}, layer=layer)

    def _gather(self, step: Step, role: str) -> list[Part]:
        """The rows of all ranks of one input, on every rank; once for all readers."""
        mine = [bound.inputs(step)[role] for bound in self._bound]
        first = mine[0]
        if self.ranks == 1 or first.value.rows > 1:
            return mine
        if first not in self._gathered:
            self._gathered[first] = [
                self._new(f"{part.value.name}.{role}.all", rank, "bf16", part.width, self.ranks)
                for rank, part in enumerate(mine)
            ]
            self._link("all_gather", step.layer, mine, self._gathered[first])
        return self._gathered[first]

    def _link(self, op: str, layer: int, inputs: list[Part], outputs: list[Part]) -> None:
        self.schedule.add(
            op,
            "link",
            {f"x{rank}": part for rank, part in enumerate(inputs)},
            {f"y{rank}": part for rank, part in enumerate(outputs)},
            layer=layer,
            attrs={"bytes": 2 * inputs[0].width},
        )

    def _everywhere(self, step: Step) -> None:
        """Gating: every rank does it for all tokens, so that nothing sorted has to travel."""
        for rank in range(self.ranks):
            inputs = {role: self._gather(step, role)[rank] for role in step.inputs}
            self._plain(step, rank, inputs, {}, self.ranks)

    def _experts(self, step: Step) -> None:
        layer, buffer, width = step.layer, step.outputs["y"].buffer, step.outputs["y"].width
        group, top_k = ring_turns(self.ring)[0], int(step.attrs["top_k"])
        parts: list[Part] = []  # of the ranks that have experts of this layer
        for rank, device in enumerate(self._names):
            held = expert_ranges(self._tiers[layer].get(device, ""))
            away = streamed_experts(self.plan, layer, rank, self.gpus)
            if not held and not away:
                continue
            x, mine = self._gather(step, "x")[rank], self._bound[rank].prefix
            order = self._new(f"{mine}layers_{layer}_order", rank, "i32", top_k, self.ranks)
            inputs = self._bound[rank].inputs(step) | {"x": x, "order": order}
            ids = {"ids": inputs["ids"]}
            self.schedule.add("sort", device, ids, {"order": order}, layer=layer)
            y = self._new(mine + buffer, rank, "f32", width, self.ranks)
            if held:
                self.schedule.again(step, device, inputs, {"y": y}, _some(held))
            for first in range(0, len(away), group):
                turn = away[first : first + group]
                slot = self._load_experts(step, rank, turn, order)
                self.schedule.again(step, device, inputs, {"y": y}, _some(turn), uses=(slot,))
            parts.append(y)
        if self.ranks > 1:
            sums = [
                self._new(f"{bound.prefix}{buffer}.own", rank, "f32", width)
                for rank, bound in enumerate(self._bound)
            ]
            self._link("exchange", layer, parts, sums)
            parts = sums
        for bound, part in zip(self._bound, parts, strict=True):
            bound.values[buffer] = part.value

    # -- loads -------------------------------------------------------------------------------------

    def _load_experts(self, step: Step, rank: int, turn: list[int], order: Part) -> str:
        group, turns = ring_turns(self.ring)
        name = f"ring{rank}.{self._turns[rank] % turns}"
        self._turns[rank] += 1
        choice = {role: step.attrs[role] for role in ("experts", "top_k")} if self.chosen else {}
        return self._load(
            rank,
            name,
            self._held[step.layer] * group,
            inputs={"order": order} if self.chosen else {},
            layer=step.layer,
            weights=step.weights,
            attrs={**_some(turn), **choice},
            weight_bytes=self._stored[step.layer] * len(turn),
        )

    def _load(
        self,
        rank: int,
        name: str,
        size: int,
        lies: Lies = "beside",
        inputs: Parts | None = None,
        **fields: Any,
    ) -> str:
        """A load into a slot of a rank's GPU; the slot."""
        slot = self.schedule.slot(name, self._names[rank], size, lies)
        resource = f"h2d{self.gpus[rank]}"
        self.schedule.add("load", resource, inputs or {}, {}, fills=(slot,), **fields)
        return slot

    def _slots(self, step: Step, rank: int) -> tuple[str, ...]:
        """The slot of a dense step's weights, loaded at the section's first step; none where they
        are resident."""
        if not step.weights or not self.streams_dense[rank]:
            return ()
        layer, part = section = step.layer, step.section
        if section not in self._loaded[rank]:
            names = self._sections[section]
            weights = [self._weights[name] for name in names]
            side = f"{part}{rank}.{layer % 2}" if layer >= 0 else f"head{rank}"
            self._loaded[rank][section] = self._load(
                rank,
                side,
                packed_bytes(weights),
                # what follows the last layer needs no room of its own: the others are done by then
                "beside" if layer >= 0 else "over slots",
                layer=layer,
                weights={str(number): name for number, name in enumerate(names)},
                weight_bytes=sum(weight.bytes for weight in weights),
            )
        return (self._loaded[rank][section],)

    def _finish(self) -> None:
        """Put gpu0's dense weights back where slots and activations were."""
        if HOME not in self._names or not self.streams_dense[0]:
            return
        weights = [self._weights[name] for name in resident_names(self.plan.phases, HOME)]
        size = sum(weight.bytes for weight in weights)
        what = {"what": "dense weights of decode, over slots and activations"}
        self._load(0, "dense0", packed_bytes(weights), "over all", attrs=what, weight_bytes=size)


def _some(experts: list[int]) -> Attrs:
    return {"range": ranges(experts), "count": len(experts)}


def _rows_of_all(step: Step) -> list[str]:
    """The inputs of a step that hold rows of all ranks."""
    roles = OPS[step.op].graph_inputs
    return [role.name for role in roles if role.rows == "all" and role.name in step.inputs]
