"""Emits the steps of `prefill.stream`: loads, computation and exchanges of every rank, in program
order. What is streamed, and how much, is decided in `load.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from hmc.ops import OPS
from hmc.passes.emit.builder import Part, Parts, Schedule, Value
from hmc.plan import Phase, Plan, Step
from hmc.plan.memory import (
    HOME,
    expert_bytes,
    packed_bytes,
    resident_names,
    stored_expert_bytes,
)
from hmc.plan.phases import STREAM
from hmc.plan.verify import EXTERNAL
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
        if leaves_host(step.op):
            names = found.setdefault((step.layer, step.section), [])
            names.extend(name for name in step.weights.values() if name not in names)
    return found


def leaves_host(op: str) -> bool:
    """Whether a step of the op goes to a GPU as a whole, where there is one."""
    return not (OPS[op].routed or OPS[op].where == "host")


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
        self._values: list[dict[str, Value]] = [{} for _ in range(self.ranks)]
        self._gathered: dict[tuple[Value, int, int], list[Part]] = {}
        self._turns = [0] * self.ranks
        self._loaded: list[dict[tuple[int, str], str]] = [{} for _ in range(self.ranks)]
        self._buffers = {buffer.name: buffer for buffer in self.base.buffers}
        self._tiers = {each.layer: each.tiers for each in self.plan.placement}
        self._sections = dense_sections(self.base)
        self._weights = {weight.name: weight for weight in self.plan.weights}
        self._stored = stored_expert_bytes(self.plan)
        self._held = expert_bytes(self.plan)
        for step in self.base.steps:
            section, row = (step.layer, step.section), OPS[step.op]
            if row.routed:
                self._experts(step)
            elif row.pages(step.attrs):
                self._attention(section, step)
            elif row.everywhere or "router" in step.attrs:
                self._everywhere(section, step)
            elif step.section == "head":
                self._plain(section, step, 0, {})  # rank 0 holds the prompt's last token
            else:
                for rank in range(self.ranks):
                    self._plain(section, step, rank, self._share())
        self._finish()
        return self.schedule.finish(self.plan.limits.max_context, ranks=self.ranks, ring=self.ring)

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
        resource = resource or f"gpu{self.gpus[rank]}"
        self.schedule.add(
            step.op,
            resource,
            inputs,
            outputs,
            layer=step.layer,
            section=step.section,
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
        if OPS[step.op].where == "host":
            inputs, outputs = self._inputs(step, rank), self._outputs(step, rank, "host")
            self._add(step, rank, inputs, outputs, attrs, resource="cpu")
            (name,) = (operand.buffer for operand in step.outputs.values())
            value = self._values[rank][name]
            moved = Value(
                f"{value.name}.gpu{self.gpus[rank]}",
                value.dtype,
                value.width,
                f"gpu{self.gpus[rank]}",
            )
            self._copy(f"h2d{self.gpus[rank]}", value, moved, attrs, step)
            self._values[rank][name] = moved
            return
        uses = self._slots(section, step, rank)
        outputs = self._outputs(step, rank, f"gpu{self.gpus[rank]}")
        self._add(step, rank, self._inputs(step, rank), outputs, attrs, uses)
        for role, operand in step.outputs.items():
            if operand.buffer == "logits":
                value = outputs[role].value
                out = Value("logits", value.dtype, value.width, external=True)
                self._copy(f"d2h{self.gpus[rank]}", value, out, {}, step)

    def _copy(
        self,
        resource: str,
        source: Value,
        target: Value,
        attrs: dict[str, int | float | str],
        step: Step,
    ) -> None:
        self.schedule.add(
            "copy",
            resource,
            {"y": Part.all(source)},
            {"y": Part.all(target)},
            layer=step.layer,
            section=step.section,
            attrs=attrs,
            kernels=("torch:copy",),
        )

    def _attention(self, section: tuple[int, str], step: Step) -> None:
        """Attention of each rank's queries over the latents (or keys and values) of all, and the
        way of the new cache rows to the host."""
        roles = [role.name for role in OPS[step.op].graph_inputs[1:]]  # all but the queries
        every = {role: self._gather(step, role) for role in roles}
        for rank in range(self.ranks):
            inputs = self._inputs(step, rank) | {role: every[role][rank] for role in roles}
            uses = self._slots(section, step, rank)
            self._add(
                step,
                rank,
                inputs,
                self._outputs(step, rank, f"gpu{self.gpus[rank]}"),
                self._share(),
                uses,
            )
        self._hand_over({role: every[role][0] for role in roles}, step.layer)

    def _hand_over(self, rows: Parts, layer: int) -> None:
        """New cache rows to the host, and from there to gpu0, which decodes, where it is no rank of
        this phase."""
        first = self.gpus[0]
        held = {
            role: Part.all(
                Value(f"cache.{layer}.{role}", part.value.dtype, part.width, external=True)
            )
            for role, part in rows.items()
        }
        away = held if first else {}
        copy = ("torch:copy",)
        self.schedule.add("kv_out", f"d2h{first}", rows, away, layer=layer, kernels=copy)
        if first:
            self.schedule.add("kv_in", "h2d0", held, {}, layer=layer, kernels=copy)

    def _gather(self, step: Step, role: str) -> list[Part]:
        """The rows of all ranks of one input, on every rank; once for all readers."""
        operand = step.inputs[role]
        mine = [
            Part(self._value(operand.buffer, r), operand.column, operand.width)
            for r in range(self.ranks)
        ]
        if self.ranks == 1 or mine[0].value.rows > 1:
            return mine
        key = (mine[0].value, mine[0].column, mine[0].width)
        if key not in self._gathered:
            values = [
                Value(
                    f"{part.value.name}.{role}.all",
                    "bf16",
                    part.width,
                    f"gpu{self.gpus[r]}",
                    rows=self.ranks,
                )
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
        for rank in range(self.ranks):
            inputs = {role: self._gather(step, role)[rank] for role in step.inputs}
            uses = self._slots(section, step, rank)
            outputs = self._outputs(step, rank, f"gpu{self.gpus[rank]}", rows=self.ranks)
            self._add(step, rank, inputs, outputs, {}, uses)

    def _experts(self, step: Step) -> None:
        parts: list[Value] = []  # of the ranks that have experts of this layer
        for rank in range(self.ranks):
            held = expert_ranges(self._tiers[step.layer].get(f"gpu{self.gpus[rank]}", ""))
            away = streamed_experts(self.plan, step.layer, rank, self.gpus)
            if not held and not away:
                continue
            x = self._gather(step, "x")[rank]
            inputs = self._inputs(step, rank) | {"x": x}
            order = Value(
                self._name(f"layers_{step.layer}_order", rank),
                "i32",
                int(step.attrs["top_k"]),
                f"gpu{self.gpus[rank]}",
                rows=self.ranks,
            )
            self.schedule.add(
                "sort",
                f"gpu{self.gpus[rank]}",
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
                f"gpu{self.gpus[rank]}",
                rows=self.ranks,
            )
            if held:
                self._add(step, rank, inputs, {"y": Part.all(y)}, _some(held))
            for first in range(0, len(away), ring_turns(self.ring)[0]):
                turn = away[first : first + ring_turns(self.ring)[0]]
                slot = self._load_experts(step, rank, turn, inputs["order"])
                self._add(step, rank, inputs, {"y": Part.all(y)}, _some(turn), (slot,))
            parts.append(y)
        buffer = step.outputs["y"].buffer
        if self.ranks == 1:
            self._values[0][buffer] = parts[0]
            return
        sums = [
            Value(self._name(f"{buffer}.own", rank), "f32", parts[0].width, f"gpu{self.gpus[rank]}")
            for rank in range(self.ranks)
        ]
        self._link(
            "exchange", step.layer, [Part.all(p) for p in parts], [Part.all(s) for s in sums]
        )
        for rank, value in enumerate(sums):
            self._values[rank][buffer] = value

    # -- loads -------------------------------------------------------------------------------------

    def _load_experts(self, step: Step, rank: int, turn: list[int], order: Part) -> str:
        size, held = self._stored[step.layer], self._held[step.layer]
        group, turns = ring_turns(self.ring)
        slot = self.schedule.slot(
            f"ring{rank}.{self._turns[rank] % turns}", f"gpu{self.gpus[rank]}", held * group
        )
        self._turns[rank] += 1
        self.schedule.add(
            "load",
            f"h2d{self.gpus[rank]}",
            {"order": order} if self.chosen else {},
            {},
            layer=step.layer,
            weights=step.weights,
            attrs=_some(turn) | (self._choice(step) if self.chosen else {}),
            kernels=("torch:copy",),
            weight_bytes=size * len(turn),
            fills=(slot,),
        )
        return slot

    @staticmethod
    def _choice(step: Step) -> dict[str, int | float | str]:
        return {role: step.attrs[role] for role in ("experts", "top_k")}

    def _slots(self, section: tuple[int, str], step: Step, rank: int) -> tuple[str, ...]:
        """The slot of a dense step's weights, loaded at the section's first step; none where they
        are resident."""
        if not step.weights or not self.streams_dense[rank]:
            return ()
        if section not in self._loaded[rank]:
            layer, part = section
            names = self._sections[section]
            weights = [self._weights[name] for name in names]
            side = f"{part}{rank}.{layer % 2}" if layer >= 0 else f"head{rank}"
            # what follows the last layer needs no room of its own: the others are done by then
            slot = self.schedule.slot(
                side,
                f"gpu{self.gpus[rank]}",
                packed_bytes(weights),
                "beside" if layer >= 0 else "over slots",
            )
            self.schedule.add(
                "load",
                f"h2d{self.gpus[rank]}",
                {},
                {},
                layer=layer,
                weights={str(number): name for number, name in enumerate(names)},
                kernels=("torch:copy",),
                weight_bytes=sum(weight.bytes for weight in weights),
                fills=(slot,),
            )
            self._loaded[rank][section] = slot
        return (self._loaded[rank][section],)

    def _finish(self) -> None:
        """Put gpu0's dense weights back where slots and activations were."""
        if HOME not in [f"gpu{gpu}" for gpu in self.gpus] or not self.streams_dense[0]:
            return
        weights = [self._weights[name] for name in resident_names(self.plan.phases, HOME)]
        whole = self.schedule.slot("dense0", HOME, packed_bytes(weights), "over all")
        self.schedule.add(
            "load",
            "h2d0",
            {},
            {},
            attrs={"what": "dense weights of decode, over slots and activations"},
            kernels=("torch:copy",),
            weight_bytes=sum(weight.bytes for weight in weights),
            fills=(whole,),
        )


def _some(experts: list[int]) -> dict[str, int | float | str]:
    return {"range": ranges(experts), "count": len(experts)}
