"""Rewrites the steps of a phase for a machine with GPUs: attention and everything dense on the
first GPU, routed experts where the placement has them, activations copied where a value is needed
on another device.

The embedding stays on the host: one row a token is cheaper to copy than the table is to hold.
Experts of several devices add their partial sums on the first GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby

from hmc.graph import Section
from hmc.ops import OPS
from hmc.passes.emit.builder import Schedule
from hmc.passes.emit.values import Bound, Part, Parts, Value
from hmc.plan import LayerPlacement, Phase, Step
from hmc.ranges import expert_ranges, ranges


@dataclass
class Lane:
    """Rewrites one copy of a base phase into `schedule`; lanes share nothing but the weights.

    A lane that is `whole` handles all rows of a call in a phase of several lanes.
    """

    schedule: Schedule
    base: Phase
    placement: Mapping[int, LayerPlacement]
    lane: int = 0
    prefix: str = ""
    whole: bool = False
    _copies: dict[tuple[Value, str], Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._bound = Bound(self.base, self.prefix)

    def emit(self, steps: Iterable[Step]) -> None:
        """Append steps of the base phase."""
        for _ in self.layers(steps):
            pass

    def split(self, lanes: Sequence[Lane], later: Iterable[Step]) -> None:
        """Hand each lane its rows of the values that `later` steps read."""
        for name, value in self._read_by(later, self._bound).items():
            halves = [
                Value(f"{lane.prefix}{value.name}", value.dtype, value.width, value.device)
                for lane in lanes
            ]
            outputs = {f"y{number}": Part.all(half) for number, half in enumerate(halves)}
            self._new("split", _resource(value.device), {"x": Part.all(value)}, outputs)
            for lane, half in zip(lanes, halves, strict=True):
                lane._bound.values[name] = half

    def join(self, lanes: Sequence[Lane], later: Iterable[Step]) -> None:
        """Put the lanes' rows of the values that `later` steps read together."""
        for name, first in self._read_by(later, lanes[0]._bound).items():
            halves = [lane._bound.values[name] for lane in lanes]
            value = Value(f"{name}.joined", first.dtype, first.width, first.device)
            inputs = {f"x{number}": Part.all(half) for number, half in enumerate(halves)}
            self._new("join", _resource(first.device), inputs, {"y": Part.all(value)})
            self._bound.values[name] = value

    @staticmethod
    def _read_by(steps: Iterable[Step], bound: Bound) -> dict[str, Value]:
        """Of the values there are, those that `steps` read, external ones left out."""
        names = dict.fromkeys(o.buffer for step in steps for o in step.inputs.values())
        known = {name: bound.values[name] for name in names if name in bound.values}
        return {name: value for name, value in known.items() if not value.external}

    def layers(self, steps: Iterable[Step]) -> Iterator[int]:
        """Append the steps, stopping after each layer, so that lanes can take turns."""
        for layer, of_layer in groupby(steps, lambda step: step.layer):
            for step in of_layer:
                if OPS[step.op].routed:
                    self._experts(step)
                else:
                    self._dense(step)
            yield layer

    def _dense(self, step: Step) -> None:
        device = "gpu0" if OPS[step.op].where != "host" else "host"
        inputs, outputs = self._inputs(step, device), self._bound.outputs(step, device)
        self._again(step, device, inputs, outputs)
        for role, part in outputs.items():
            if part.value.external:
                logits = replace(part.value, name=f"{self.prefix}logits", device="host")
                results = {role: Part.all(logits)}
                self._new("copy", "d2h0", {role: part}, results, step.layer, section=step.section)

    def _again(
        self, step: Step, device: str, inputs: Parts, outputs: Parts, **attrs: int | str
    ) -> None:
        """What a step of the base phase does, on a device."""
        attrs |= {"whole": 1} if self.whole else {}
        self.schedule.again(step, _resource(device), inputs, outputs, attrs, lane=self.lane)

    def _new(
        self,
        op: str,
        resource: str,
        inputs: Parts,
        outputs: Parts,
        layer: int = -1,
        section: Section = "",
        **attrs: int,
    ) -> None:
        """A step that the base phase has not."""
        attrs |= {"whole": 1} if self.whole else {}
        self.schedule.add(
            op, resource, inputs, outputs, layer=layer, section=section, attrs=attrs, lane=self.lane
        )

    def _experts(self, step: Step) -> None:
        """One step for each device that holds experts of the layer; partial sums meet on gpu0."""
        tiers = self.placement[step.layer].tiers
        output = step.outputs["y"]
        sums = []
        for tier in sorted(tiers):
            inputs = self._inputs(step, tier)
            suffix = "" if len(tiers) == 1 else f".{tier}"
            value = Value(f"{self.prefix}{output.buffer}{suffix}", "f32", output.width, tier)
            here = expert_ranges(tiers[tier])
            some: dict[str, int | str] = {"range": ranges(here), "count": len(here)}
            some = some if len(tiers) > 1 else {}
            self._again(step, tier, inputs, {"y": Part.all(value)}, **some)
            sums.append(value)
        # the GPU's own sum first: those of the others come back later
        sums.sort(key=lambda value: value.device != "gpu0")
        total = sums[0]
        for other in sums[1:]:
            inputs = {
                "h": self._on(Part.all(total), "gpu0", step),
                "d0": self._on(Part.all(other), "gpu0", step),
            }
            summed = Value(f"{total.name}.plus", "f32", output.width, "gpu0")
            results = {"y": Part.all(summed)}
            self._new("add", "gpu0", inputs, results, step.layer, width=output.width)
            total = summed
        self._bound.values[output.buffer] = total

    def _inputs(self, step: Step, device: str) -> dict[str, Part]:
        """The step's inputs on a device; those that must be moved together go in one copy."""
        parts = self._bound.inputs(step)
        away = {role: part.value for role, part in parts.items() if self._away(part.value, device)}
        for home in sorted({value.device for value in away.values()}):
            moving = {role: value for role, value in away.items() if value.device == home}
            self._move(moving, device, step)
        return {role: self._on(part, device, step) for role, part in parts.items()}

    def _away(self, value: Value, device: str) -> bool:
        outside = value.external and value.device == "host"
        return not outside and value.device != device and (value, device) not in self._copies

    def _on(self, part: Part, device: str, step: Step) -> Part:
        if self._away(part.value, device):
            self._move({"y": part.value}, device, step)
        return replace(part, value=self._copies.get((part.value, device), part.value))

    def _move(self, values: Mapping[str, Value], device: str, step: Step) -> None:
        """Copy values of one device to another; from GPU to GPU through the host."""
        home = next(iter(values.values())).device
        if home != "host" and device != "host":
            self._move(values, "host", step)
            values = {role: self._copies[value, "host"] for role, value in values.items()}
            home = "host"
        copies = {
            role: replace(value, name=f"{value.name}.{device}", device=device)
            for role, value in values.items()
        }
        self._new(
            "copy",
            f"h2d{device[3:]}" if home == "host" else f"d2h{home[3:]}",
            {role: Part.all(value) for role, value in values.items()},
            {role: Part.all(value) for role, value in copies.items()},
            step.layer,
        )
        for role, value in values.items():
            self._copies[value, device] = copies[role]
            for (origin, place), copy in list(self._copies.items()):
                if copy is value and place == "host":
                    self._copies[origin, device] = copies[role]


def _resource(device: str) -> str:
    """What computes on a device."""
    return "cpu" if device == "host" else device


def hybrid_phase(base: Phase, placement: Mapping[int, LayerPlacement]) -> Phase:
    """A phase of one lane: `base` with its dense part on gpu0."""
    schedule = Schedule(base.name)
    Lane(schedule, base, placement).emit(base.steps)
    return schedule.finish(base.max_tokens)
