"""Builds phases over several resources: turns steps on named values into steps on buffers with the
events that order them. Hides buffer reuse, events, and the vector clocks behind them.

Used by the passes that emit schedules with GPUs. A value is written once, or again in place; a
*region* of a device's activation arena is reused as soon as no later step of the program reads
what lives there. Whatever order a step needs beyond the order of its own resource becomes one
event, unless another wait implies it. Slots of weights lie one after the other, the arena after
them; some lie over all of these.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from hmc.ops import OPS
from hmc.passes.emit.values import Attrs, Part, Parts, Value
from hmc.plan import Buffer, Operand, Phase, Slot, Step
from hmc.plan.memory import slot_offsets
from hmc.plan.model import EXTERNAL
from hmc.plan.order import slots_sharing

_LAYER = re.compile(r"layers_\d+_")


@dataclass
class _Draft:
    step: Step
    inputs: Parts
    outputs: Parts

    @property
    def parts(self) -> tuple[Part, ...]:
        """All that it reads or writes."""
        return *self.inputs.values(), *self.outputs.values()


@dataclass(eq=False)
class _Region:
    """Bytes a token of one device's arena; `touched`: the tenant's last use on each resource."""

    device: str
    number: int
    bytes: int
    offset: int = 0
    touched: dict[str, int] = field(default_factory=dict)


Lies = Literal["beside", "over slots", "over all"]
"""Where a slot is: beside the others; over those, from the first on; or over activations too."""


@dataclass(frozen=True)
class _SlotDraft:
    device: str
    bytes: int
    lies: Lies


@dataclass
class Schedule:
    """One phase in the making: `add` steps in program order, then `finish`.

    The program order must be possible on one resource alone; the order of steps on each resource
    is the order they were added in.
    """

    name: str
    _drafts: list[_Draft] = field(default_factory=list)
    _slots: dict[str, _SlotDraft] = field(default_factory=dict)

    def add(self, op: str, resource: str, inputs: Parts, outputs: Parts, **fields: Any) -> None:
        """Append a step with more `fields`; a device computes it unless `kernels` are given."""
        kernel = OPS[op].device_kernel(fields.get("attrs", {}))
        given = {"layer": -1, "kernels": (kernel,), **fields}
        step = Step(id=0, op=op, resource=resource, inputs={}, outputs={}, **given)
        self._drafts.append(_Draft(step, inputs, outputs))

    def again(
        self,
        step: Step,
        resource: str,
        inputs: Parts,
        outputs: Parts,
        attrs: Attrs,
        *,
        lane: int = 0,
        uses: tuple[str, ...] = (),
    ) -> None:
        """Append what a step of the CPU's phase does, with more `attrs`, on a resource."""
        changes = {"resource": resource, "attrs": {**step.attrs, **attrs}, "lane": lane}
        if resource != "cpu":
            changes["kernels"] = (OPS[step.op].device_kernel({**step.attrs, **attrs}),)
        step = step.model_copy(update={**changes, "uses": uses})
        self._drafts.append(_Draft(step, inputs, outputs))

    def slot(self, name: str, device: str, size: int, lies: Lies = "beside") -> str:
        """Declare a slot, or make a declared one as large as `size` bytes; returns its name."""
        known = self._slots.get(name)
        if known is None or known.bytes < size:
            self._slots[name] = _SlotDraft(device, size, lies)
        return name

    def finish(self, max_tokens: int, *, ranks: int = 1, lanes: int = 1, ring: int = 0) -> Phase:
        """The phase: buffers placed, events assigned."""
        homes, regions, hazards = self._place()
        slots, arena_at = self._placed_slots()
        totals: dict[str, int] = {}
        for each in regions:
            each.offset = totals.get(each.device, 0)
            totals[each.device] = each.offset + each.bytes
        buffers: dict[str, Buffer] = {}
        names: dict[Value, str] = {}
        for value, region in homes.items():
            where = "" if region is None else f"@{region.device}.{region.number}"
            name = value.name if region is None else _LAYER.sub("", value.name) + where
            known = buffers.get(name)
            if known is not None and (known.width, known.dtype) != (value.width, value.dtype):
                name += f".{value.dtype}{value.width}"
            names[value] = name
            buffers[name] = value.buffer(name, EXTERNAL if region is None else region.offset)
        before = self._dependencies(hazards, slots, arena_at)
        return Phase(
            name=self.name,
            max_tokens=max_tokens,
            activation_bytes=totals.pop("host", 0),
            buffers=tuple(buffers.values()),
            steps=tuple(_with_events(self._steps(names), before)),
            slots=tuple(slots.values()),
            device_bytes=totals,
            arena_at=arena_at,
            ranks=ranks,
            lanes=lanes,
            ring=ring,
        )

    def finish_alone(self, max_tokens: int, first: Iterable[Value]) -> Phase:
        """The phase of the CPU alone, in the order of the program: every value has a buffer of its
        own, those of `first` before the others. The largest are placed first, each as low as its
        life allows.
        """
        lives: dict[Value, tuple[int, int]] = {}
        for position, draft in enumerate(self._drafts):
            for part in draft.parts:
                lives[part.value] = lives.get(part.value, (position, 0))[0], position
        offsets = dict.fromkeys((*first, *lives), EXTERNAL)
        alive: list[list[Value]] = [[] for _ in self._drafts]
        inside = [value for value in lives if not value.external]
        for value in sorted(inside, key=lambda each: (-each.bytes, lives[each][0], each.name)):
            life, offset = slice(lives[value][0], lives[value][1] + 1), 0
            for other in sorted(
                {each for there in alive[life] for each in there}, key=offsets.__getitem__
            ):
                if offset < offsets[other] + other.bytes and offsets[other] < offset + value.bytes:
                    offset = offsets[other] + other.bytes
            offsets[value] = offset
            for there in alive[life]:
                there.append(value)
        return Phase(
            name=self.name,
            max_tokens=max_tokens,
            activation_bytes=max((offsets[each] + each.bytes for each in inside), default=0),
            buffers=tuple(value.buffer(value.name, at) for value, at in offsets.items()),
            steps=tuple(self._steps({value: value.name for value in offsets})),
        )

    def _steps(self, names: Mapping[Value, str]) -> list[Step]:
        """The steps in order, on buffers of these names."""
        operands: dict[Part, Operand] = {}

        def operands_of(parts: Parts) -> dict[str, Operand]:
            for part in parts.values():
                if part not in operands:
                    operands[part] = Operand(
                        buffer=names[part.value], column=part.column, width=part.width
                    )
            return {role: operands[part] for role, part in parts.items()}

        return [
            draft.step.model_copy(
                update={
                    "id": position,
                    "inputs": operands_of(draft.inputs),
                    "outputs": operands_of(draft.outputs),
                }
            )
            for position, draft in enumerate(self._drafts)
        ]

    def _placed_slots(self) -> tuple[dict[str, Slot], dict[str, int]]:
        """The slots by name, and where activations begin on devices that have slots."""
        offsets: dict[str, int] = {}
        arena_at: dict[str, int] = {}
        for device in dict.fromkeys(slot.device for slot in self._slots.values()):
            here = {name: slot for name, slot in self._slots.items() if slot.device == device}
            under = {name: slot for name, slot in here.items() if slot.lies != "over all"}
            places, arena_at[device] = slot_offsets(
                [(slot.bytes, slot.lies != "beside") for slot in under.values()]
            )
            offsets |= dict.fromkeys(here, 0) | dict(zip(under, places, strict=True))
        slots = {
            name: Slot(name=name, device=slot.device, bytes=slot.bytes, offset=offsets[name])
            for name, slot in self._slots.items()
        }
        return slots, arena_at

    def _place(
        self,
    ) -> tuple[dict[Value, _Region | None], list[_Region], dict[int, list[int]]]:
        """A region for every value; and, by position, whom the writer of a reused region follows.

        Linear scan in program order: a value takes the smallest region free on its device that
        holds it, else the largest, which grows, else a new one. Values of one name modulo layer
        are asked to stay where they were, so that layers look alike.
        """
        last: dict[Value, int] = {}
        for position, draft in enumerate(self._drafts):
            for part in draft.parts:
                last[part.value] = position
        ends: dict[int, list[Value]] = {}
        for value, position in last.items():
            ends.setdefault(position, []).append(value)
        homes: dict[Value, _Region | None] = {}
        regions: list[_Region] = []
        free: dict[str, list[_Region]] = {}
        usual: dict[tuple[str, int], _Region] = {}
        hazards: dict[int, list[int]] = {}
        for position, draft in enumerate(self._drafts):
            for part in draft.parts:
                value = part.value
                if value in homes:
                    continue
                if value.external:
                    homes[value] = None
                    continue
                pool = free.setdefault(value.device, [])
                key = (value.device + _LAYER.sub("", value.name), value.bytes)
                region = _take(pool, value.bytes, usual.get(key))
                if region is None:
                    number = sum(each.device == value.device for each in regions)
                    region = _Region(value.device, number, value.bytes)
                    regions.append(region)
                region.bytes = max(region.bytes, value.bytes)
                hazards.setdefault(position, []).extend(region.touched.values())
                region.touched = {}
                usual[key] = region
                homes[value] = region
            for part in draft.parts:
                home = homes[part.value]
                if home is not None:
                    home.touched[draft.step.resource] = position
            for value in ends.get(position, ()):
                home = homes[value]
                if home is not None:
                    free[value.device].append(home)
        return homes, regions, hazards

    def _dependencies(
        self,
        hazards: Mapping[int, Iterable[int]],
        slots: Mapping[str, Slot],
        arena_at: Mapping[str, int],
    ) -> list[set[int]]:
        """By position, the earlier positions that must be done: writes before reads, uses before
        writes in place, the last tenant before the next, loads before uses before loads of any slot
        that shares bytes, and all activations before a load over them. Of one resource only the
        last counts."""
        writes: dict[Value, dict[str, int]] = {}
        touched: dict[Value, dict[str, int]] = {}
        loads: dict[str, int] = {}
        used: dict[str, dict[str, int]] = {}
        computed: dict[str, dict[str, int]] = {}
        sharing = slots_sharing(slots.values())
        result = []
        for position, draft in enumerate(self._drafts):
            resource = draft.step.resource
            before = set(hazards.get(position, ()))
            for part in draft.inputs.values():
                before.update(writes.get(part.value, {}).values())
            for part in draft.outputs.values():
                before.update(touched.get(part.value, {}).values())
            for part in draft.parts:
                touched.setdefault(part.value, {})[resource] = position
                computed.setdefault(part.value.device, {})[resource] = position
            for part in draft.outputs.values():
                writes.setdefault(part.value, {})[resource] = position
            for name in draft.step.uses:
                before.add(loads[name])
                used[name][resource] = position
            for name in draft.step.fills:
                for other in sharing[name]:
                    before.update(used.get(other, {}).values())
                device = slots[name].device
                if slots[name].offset + slots[name].bytes > arena_at[device]:
                    before.update(computed.get(device, {}).values())
                loads[name], used[name] = position, {resource: position}
            before.discard(position)
            result.append(before)
        return result


def _take(pool: list[_Region], size: int, usual: _Region | None) -> _Region | None:
    """Remove a region from the pool: the usual one, the smallest that holds `size`, or the
    largest."""
    if not pool:
        return None
    fitting = [each for each in pool if each.bytes >= size] or [max(pool, key=_bytes)]
    found = usual if usual in pool else min(fitting, key=_bytes)
    pool.remove(found)
    return found


def _bytes(region: _Region) -> int:
    return region.bytes


def _with_events(steps: list[Step], before: list[set[int]]) -> list[Step]:
    """The steps with as few events as order them.

    A clock holds, for every resource, the last position known to be done. Dependencies are taken
    latest first: one that the clock already covers needs no event.
    """
    clocks: list[dict[str, int]] = []
    last_on: dict[str, int] = {}
    waits: list[list[int]] = []
    signalling: set[int] = set()
    for position, step in enumerate(steps):
        clock: dict[str, int] = {}
        if step.resource in last_on:
            previous = last_on[step.resource]
            clock = {**clocks[previous], step.resource: previous}
        mine = []
        for each in sorted(before[position], reverse=True):
            resource = steps[each].resource
            if clock.get(resource, -1) >= each:
                continue
            mine.append(each)
            for name, done in (*clocks[each].items(), (resource, each)):
                clock[name] = max(clock.get(name, -1), done)
        signalling.update(mine)
        waits.append(mine)
        clocks.append(clock)
        last_on[step.resource] = position
    numbers = {position: number for number, position in enumerate(sorted(signalling))}
    return [
        step.model_copy(
            update={
                "waits": tuple(sorted(numbers[each] for each in waits[position])),
                "signal": numbers.get(position, -1),
            }
        )
        for position, step in enumerate(steps)
    ]
