"""Rewrites the steps of a phase for a machine with GPUs: attention and everything dense on the
first GPU, routed experts where the placement has them, activations copied where a value is needed
on another device.

The embedding stays on the host: one row a token is cheaper to copy than the table is to hold.
Experts of several devices add their partial sums on the first GPU.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from hmc.graph import Section
from hmc.ops import OPS
from hmc.passes.emit.builder import Part, Parts, Schedule, Value
from hmc.plan import LayerPlacement, Phase, Step
from hmc.plan.verify import EXTERNAL
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
    _values: dict[str, Value] = field(default_factory=dict)
    _copies: dict[tuple[Value, str], Value] = field(default_factory=dict)

    def emit(self, steps: Iterable[Step]) -> None:
        """Append steps of the base phase."""
        for _ in self.layers(steps):
            pass

    def split(self, lanes: Sequence[Lane], later: Iterable[Step]) -> None:
        """Hand each lane its rows of the values that `later` steps read."""
        for name, value in self._read_by(later, self._values).items():
            halves = [
                Value(f"{lane.prefix}{value.name}", value.dtype, value.width, value.device)
                for lane in lanes
            ]
            outputs = {f"y{number}": Part.all(half) for number, half in enumerate(halves)}
            self._rows("split", value.device, {"x": Part.all(value)}, outputs)
            for lane, half in zip(lanes, halves, strict=True):
                lane._values[name] = half

    def join(self, lanes: Sequence[Lane], later: Iterable[Step]) -> None:
        """Put the lanes' rows of the values that `later` steps read together."""
        for name, first in self._read_by(later, lanes[0]._values).items():
            halves = [lane._values[name] for lane in lanes]
            value = Value(f"{name}.joined", first.dtype, first.width, first.device)
            inputs = {f"x{number}": Part.all(half) for number, half in enumerate(halves)}
            self._rows("join", first.device, inputs, {"y": Part.all(value)})
            self._values[name] = value

    def _rows(self, op: str, device: str, inputs: Parts, outputs: Parts) -> None:
        resource = "cpu" if device == "host" else device
        self.schedule.add(
            op, resource, inputs, outputs, attrs=self._attrs(), kernels=(f"torch:{op}",)
        )

    @staticmethod
    def _read_by(steps: Iterable[Step], values: Mapping[str, Value]) -> dict[str, Value]:
        """Of `values`, those that `steps` read, external ones left out."""
        names = dict.fromkeys(o.buffer for step in steps for o in step.inputs.values())
        return {
            name: values[name] for name in names if name in values and not values[name].external
        }

    def _attrs(self) -> dict[str, int | float | str]:
        return {"whole": 1} if self.whole else {}

    def layers(self, steps: Iterable[Step]) -> Iterator[int]:
        """Append the steps, stopping after each layer, so that lanes can take turns."""
        buffers = {buffer.name: buffer for buffer in self.base.buffers}
        layer = None
        for step in steps:
            if layer is not None and step.layer != layer:
                yield layer
            layer = step.layer
            for name in (each.buffer for each in step.inputs.values()):
                if name not in self._values:
                    found = buffers[name]
                    assert found.offset == EXTERNAL
                    self._values[name] = Value(
                        self.prefix + name, found.dtype, found.width, external=True
                    )
            row = OPS[step.op]
            if row.routed:
                self._experts(step)
                continue
            device, resource = ("host", "cpu") if row.where == "host" else ("gpu0", "gpu0")
            inputs = self._inputs(step, device)
            outputs = {}
            for role, operand in step.outputs.items():
                known = self._values.get(operand.buffer)
                if known is not None and known.device == device:  # in place
                    outputs[role] = Part(known, operand.column, operand.width)
                    continue
                found = buffers[operand.buffer]
                outside = found.offset == EXTERNAL  # logits: of the rows wanted, not of all
                value = Value(
                    f"{self.prefix}{found.name}" + (".device" if outside else ""),
                    found.dtype,
                    found.width,
                    device,
                    external=outside,
                )
                self._values[operand.buffer] = value
                outputs[role] = Part.all(value)
            self._add(step, resource, inputs, outputs)
            if "logits" in (each.buffer for each in step.outputs.values()):
                logits = next(iter(outputs.values())).value
                out = Value(f"{self.prefix}logits", logits.dtype, logits.width, external=True)
                self._copy(
                    {"y": Part.all(logits)}, {"y": Part.all(out)}, "d2h0", step.layer, "head"
                )
        if layer is not None:
            yield layer

    def _add(
        self,
        step: Step,
        resource: str,
        inputs: Parts,
        outputs: Parts,
        attrs: Mapping[str, int | float | str] | None = None,
    ) -> None:
        self.schedule.add(
            step.op,
            resource,
            inputs,
            outputs,
            layer=step.layer,
            section=step.section,
            weights=step.weights,
            attrs={**step.attrs, **(attrs or {}), **self._attrs()},
            kernels=step.kernels if resource == "cpu" else (f"torch:{step.op}",),
            lane=self.lane,
            weight_bytes=step.weight_bytes,
            flops=step.flops,
        )

    def _experts(self, step: Step) -> None:
        """One step for each device that holds experts of the layer; partial sums meet on gpu0."""
        tiers = self.placement[step.layer].tiers
        output = step.outputs["y"]
        sums = []
        for tier in sorted(tiers):
            device = "host" if tier == "host" else tier
            inputs = self._inputs(step, device)
            suffix = "" if len(tiers) == 1 else f".{tier}"
            value = Value(f"{self.prefix}{output.buffer}{suffix}", "f32", output.width, device)
            here = expert_ranges(tiers[tier])
            attrs: dict[str, int | float | str] = (
                {} if len(tiers) == 1 else {"range": ranges(here), "count": len(here)}
            )
            self._add(
                step, "cpu" if device == "host" else device, inputs, {"y": Part.all(value)}, attrs
            )
            sums.append(value)
        # the GPU's own sum first: those of the others come back later
        sums.sort(key=lambda value: value.device != "gpu0")
        total = sums[0]
        for other in sums[1:]:
            inputs = {
                "h": Part.all(self._on(total, "gpu0", step.layer)),
                "d0": Part.all(self._on(other, "gpu0", step.layer)),
            }
            summed = Value(f"{total.name}.plus", "f32", output.width, "gpu0")
            self.schedule.add(
                "add",
                "gpu0",
                inputs,
                {"y": Part.all(summed)},
                layer=step.layer,
                attrs={"width": output.width, **self._attrs()},
                kernels=("torch:add",),
                lane=self.lane,
            )
            total = summed
        self._values[output.buffer] = total

    def _inputs(self, step: Step, device: str) -> dict[str, Part]:
        """The step's inputs on a device; those that must be moved together go in one copy."""
        parts = {
            role: Part(self._values[operand.buffer], operand.column, operand.width)
            for role, operand in step.inputs.items()
        }
        homes = {part.value.device for part in parts.values() if self._away(part.value, device)}
        for home in sorted(homes):
            moving = {
                role: part.value
                for role, part in parts.items()
                if part.value.device == home and self._away(part.value, device)
            }
            self._move(moving, device, step.layer)
        return {
            role: Part(self._copies.get((part.value, device), part.value), part.column, part.width)
            for role, part in parts.items()
        }

    def _away(self, value: Value, device: str) -> bool:
        outside = value.external and value.device == "host"
        return not outside and value.device != device and (value, device) not in self._copies

    def _on(self, value: Value, device: str, layer: int) -> Value:
        if self._away(value, device):
            self._move({"y": value}, device, layer)
        return self._copies.get((value, device), value)

    def _move(self, values: Mapping[str, Value], device: str, layer: int) -> None:
        """Copy values of one device to another; from GPU to GPU through the host."""
        home = next(iter(values.values())).device
        if home != "host" and device != "host":
            self._move(values, "host", layer)
            values = {role: self._copies[value, "host"] for role, value in values.items()}
            home = "host"
        resource = f"h2d{device[3:]}" if home == "host" else f"d2h{home[3:]}"
        copies = {
            role: Value(f"{value.name}.{device}", value.dtype, value.width, device)
            for role, value in values.items()
        }
        self._copy(
            {role: Part.all(value) for role, value in values.items()},
            {role: Part.all(value) for role, value in copies.items()},
            resource,
            layer,
        )
        for role, value in values.items():
            self._copies[value, device] = copies[role]
            for (origin, place), copy in list(self._copies.items()):
                if copy is value and place == "host":
                    self._copies[origin, device] = copies[role]

    def _copy(
        self, inputs: Parts, outputs: Parts, resource: str, layer: int, section: Section = ""
    ) -> None:
        self.schedule.add(
            "copy",
            resource,
            inputs,
            outputs,
            layer=layer,
            section=section,
            attrs=self._attrs(),
            kernels=("torch:copy",),
            lane=self.lane,
        )


def hybrid_phase(base: Phase, placement: Mapping[int, LayerPlacement]) -> Phase:
    """A phase of one lane: `base` with its dense part on gpu0."""
    schedule = Schedule(base.name)
    Lane(schedule, base, placement).emit(base.steps)
    return schedule.finish(base.max_tokens)
