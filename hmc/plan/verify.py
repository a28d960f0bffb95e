"""Checks the meaning of a plan: what pydantic cannot see. Every broken rule raises `VerifyError`
naming step and rule.

order       every read comes after the write it needs, in one resource's order or through an event
reuse       bytes of the activation arena are not written while another buffer living there is still
in use
bounds      operands lie inside their buffers, buffers inside the arena, tensors inside their shards
names       weights, kernels, constants and events that steps name exist
slots       weights are used from a slot that a load filled with them before, and no load fills
bytes that are in use, be it by another slot or by activations (ON and OFF events)
placement   every expert of every layer is in exactly one tier
cache       what the steps of each phase keep between calls is what the layout says
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate

from hmc.errors import VerifyError
from hmc.ops import op_of
from hmc.plan.base import DTYPE_BYTES
from hmc.plan.model import Buffer, Phase, Plan, Slot, Step
from hmc.plan.states import state_groups

EXTERNAL = -1
"""Offset of buffers that the engine owns: ids, positions, rows and logits."""


def verify_plan(plan: Plan) -> None:
    """Raise `VerifyError` on the first rule that `plan` breaks."""
    _check_tensors(plan)
    _check_placement(plan)
    weights = {weight.name for weight in plan.weights}
    weights |= {f"layer:{experts.layer}" for experts in plan.experts}
    for phase in plan.phases:
        for step in phase.steps:
            _check_names(plan, phase, step, weights)
        _check_bounds(phase)
        check_order(phase)
        _check_states(plan, phase)


def _check_states(plan: Plan, phase: Phase) -> None:
    """Every phase keeps what the layout says: each op of each layer once for all rows of a call."""
    rows: dict[tuple[int, str], int] = {}
    kept = []
    for step in phase.steps:
        if states := op_of(step.op).states(step.attrs):
            kept.append((step.layer, states))
            count = phase.lanes if "whole" in step.attrs else 1
            rows[step.layer, step.op] = rows.get((step.layer, step.op), 0) + count
    if state_groups(kept) != plan.kv.groups or set(rows.values()) - {phase.ranks * phase.lanes}:
        raise VerifyError(f"phase {phase.name}: its steps keep other states than the layout says")


def expert_ranges(text: str) -> list[int]:
    """Expert numbers of a placement text such as "0-31,77"; `VerifyError` when it is none."""
    result: list[int] = []
    for part in filter(None, text.split(",")):
        first, _, last = part.partition("-")
        if not first.isdigit() or (last and not last.isdigit()):
            raise VerifyError(f"placement: '{text}' is no list of expert ranges")
        result.extend(range(int(first), int(last or first) + 1))
    return result


def _check_names(plan: Plan, phase: Phase, step: Step, weights: set[str]) -> None:
    where = f"phase {phase.name}, step {step.id} ({step.op})"
    for role, name in step.weights.items():
        if name not in weights:
            raise VerifyError(f"{where}: {role} names weight {name}, which the plan does not hold")
    for key in step.kernels:
        if key.startswith("torch:"):
            continue
        if key not in plan.kernels:
            raise VerifyError(f"{where}: kernel {key} is not in the plan")
        limit = dict(plan.kernels[key].params).get("tokens", phase.max_tokens)
        if phase.max_tokens > limit:
            raise VerifyError(
                f"{where}: kernel {key} takes {limit} tokens a call, its phase {phase.max_tokens}"
            )
    if step.op == "rotary" and str(step.attrs.get("rope")) not in plan.constants:
        raise VerifyError(f"{where}: rotary constant {step.attrs.get('rope')} is not in the plan")


def _check_bounds(phase: Phase) -> None:
    buffers = {buffer.name: buffer for buffer in phase.buffers}
    if len(buffers) != len(phase.buffers):
        raise VerifyError(f"phase {phase.name}: two buffers share a name")
    for buffer in phase.buffers:
        if buffer.offset != EXTERNAL and not (
            0
            <= buffer.offset
            <= buffer.offset + _bytes(buffer)
            <= (
                phase.activation_bytes
                if buffer.device == "host"
                else phase.device_bytes.get(buffer.device, 0)
            )
        ):
            raise VerifyError(
                f"phase {phase.name}: buffer {buffer.name} leaves the activation arena"
            )
    sizes = {slot.name: slot.bytes for slot in phase.slots}
    for step in phase.steps:
        if step.fills and step.weight_bytes > sum(sizes.get(name, 0) for name in step.fills):
            raise VerifyError(
                f"phase {phase.name}, step {step.id} ({step.op}): its slots are too small"
            )
        for role, operand in (*step.inputs.items(), *step.outputs.items()):
            found = buffers.get(operand.buffer)
            if found is None:
                raise VerifyError(
                    f"phase {phase.name}, step {step.id} ({step.op}): {role} names buffer"
                    f" {operand.buffer}, which is not declared"
                )
            if operand.column + operand.width > found.width:
                raise VerifyError(
                    f"phase {phase.name}, step {step.id} ({step.op}): {role} reads columns beyond"
                    f" buffer {found.name} ({found.width} wide)"
                )


def check_order(phase: Phase) -> None:
    """Raise `VerifyError` where a step of a phase is not ordered after what it needs.

    Walks the steps with a vector clock each: resource -> position of its last step known done.

    `live` maps every buffer that holds a value to its writes and to all its uses, of each resource
    the last position; whoever takes over its bytes must come after them all, and ends its life.
    """
    clocks: list[dict[str, int]] = []
    last_on: dict[str, int] = {}
    signalled: dict[int, int] = {}
    live: dict[str, tuple[dict[str, int], dict[str, int]]] = {}
    slots = _Slots(phase)
    buffers = {buffer.name: buffer for buffer in phase.buffers}
    resources = [step.resource for step in phase.steps]
    for position, step in enumerate(phase.steps):
        where = f"phase {phase.name}, step {step.id} ({step.op})"
        before = [last_on[step.resource]] if step.resource in last_on else []
        for event in step.waits:
            if event not in signalled:
                raise VerifyError(
                    f"{where}: waits for event {event}, which no earlier step signals"
                )
            before.append(signalled[event])
        clock = _merged(before, clocks, resources)
        clocks.append(clock)
        last_on[step.resource] = position
        if step.signal >= 0:
            signalled[step.signal] = position

        def done(earlier: dict[str, int], clock: dict[str, int] = clock) -> bool:
            return all(clock.get(resource, -1) >= last for resource, last in earlier.items())

        for operand in step.inputs.values():
            name = operand.buffer
            if name not in live:
                if buffers[name].offset != EXTERNAL:
                    raise VerifyError(f"{where}: reads buffer {name} before anything wrote it")
                live[name] = ({}, {})
            if not done(live[name][0]):
                raise VerifyError(f"{where}: reads buffer {name} without waiting for its write")
        for operand in step.outputs.values():
            name = operand.buffer
            if name in live and not done(live[name][1]):
                raise VerifyError(f"{where}: overwrites buffer {name} while it is in use")
            if name not in live:
                for other in _overlapping(buffers[name], live, buffers):
                    if not done(live[other][1]):
                        raise VerifyError(
                            f"{where}: {name} reuses bytes of {other} while it is in use"
                        )
                    del live[other]
                slots.cover(buffers[name], done, where)
                live[name] = ({}, {})
            live[name][0][step.resource] = position
        for operand in (*step.inputs.values(), *step.outputs.values()):
            if operand.buffer in live:
                live[operand.buffer][1][step.resource] = position
        slots.use(step, position, done, where)
        for device in slots.fill(step, position, done, where):
            for name in [each for each in live if buffers[each].device == device]:
                if buffers[name].offset == EXTERNAL:
                    continue
                if not done(live[name][1]):
                    raise VerifyError(f"{where}: fills bytes of {name} while it is in use")
                del live[name]


_Done = Callable[[dict[str, int]], bool]
"""Whether the positions given, each the last of its resource, are known to be done."""


class _Slots:
    """What the slots of a phase hold while its steps are walked, and who loaded and uses it."""

    def __init__(self, phase: Phase) -> None:
        self._known = {slot.name: slot for slot in phase.slots}
        self._sharing = slots_sharing(phase.slots)
        self._over = {
            slot.name
            for slot in phase.slots
            if slot.offset + slot.bytes > phase.arena_at.get(slot.device, 0)
        }
        self._content: dict[str, frozenset[str]] = {}
        self._load: dict[str, dict[str, int]] = {}
        self._touched: dict[str, dict[str, int]] = {}

    def use(self, step: Step, position: int, done: _Done, where: str) -> None:
        """Check what a step reads from slots."""
        held: frozenset[str] = frozenset()
        for name in step.uses:
            self._check(name, where)
            if name not in self._load:
                raise VerifyError(f"{where}: uses slot {name} before anything filled it")
            if not done(self._load[name]):
                raise VerifyError(f"{where}: uses slot {name} without waiting for its load")
            held |= self._content[name]
            self._touched[name][step.resource] = position
        if step.uses and (missing := _content(step) - held):
            raise VerifyError(f"{where}: its slots do not hold {min(missing)}")

    def fill(self, step: Step, position: int, done: _Done, where: str) -> set[str]:
        """Check what a step loads; the devices whose activations it overwrites."""
        for name in step.fills:
            self._check(name, where)
            for other in self._sharing[name]:
                self._end(other, done, where)
            mine = {step.resource: position}
            self._content[name] = _content(step)
            self._load[name], self._touched[name] = mine, dict(mine)
        return {self._known[name].device for name in step.fills if name in self._over}

    def cover(self, buffer: Buffer, done: _Done, where: str) -> None:
        """Check a buffer that begins to live: it may lie over slots that reach into the arena."""
        for name in self._over:
            if buffer.offset != EXTERNAL and self._known[name].device == buffer.device:
                self._end(name, done, where)

    def _end(self, name: str, done: _Done, where: str) -> None:
        if not done(self._touched.get(name, {})):
            raise VerifyError(f"{where}: fills slot {name} while it is in use")
        for table in (self._content, self._load, self._touched):
            table.pop(name, None)

    def _check(self, name: str, where: str) -> None:
        if name not in self._known:
            raise VerifyError(f"{where}: slot {name} is not declared")


def slots_sharing(slots: Iterable[Slot]) -> dict[str, list[str]]:
    """By slot, those of its device that share bytes with it, itself among them."""
    every = list(slots)
    return {
        slot.name: [
            other.name
            for other in every
            if other.device == slot.device
            and other.offset < slot.offset + slot.bytes
            and slot.offset < other.offset + other.bytes
        ]
        for slot in every
    }


def _content(step: Step) -> frozenset[str]:
    """What a step loads or reads: weight names; experts with their range."""
    ranged = f"[{step.attrs['range']}]" if "range" in step.attrs else ""
    return frozenset(
        name + ranged if name.startswith("layer:") else name for name in step.weights.values()
    )


def _merged(
    before: list[int], clocks: list[dict[str, int]], resources: list[str]
) -> dict[str, int]:
    """The clock of a step that starts after the steps at `before`."""
    if len(before) == 1:
        return {**clocks[before[0]], resources[before[0]]: before[0]}
    clock: dict[str, int] = {}
    for earlier in before:
        for resource, index in (*clocks[earlier].items(), (resources[earlier], earlier)):
            clock[resource] = max(clock.get(resource, -1), index)
    return clock


def _overlapping(buffer: Buffer, live: Iterable[str], buffers: dict[str, Buffer]) -> list[str]:
    """The live buffers that share bytes with `buffer`."""
    start, stop = buffer.offset, buffer.offset + _bytes(buffer)
    return [
        name
        for name in live
        if (other := buffers[name]).offset != EXTERNAL
        and other.device == buffer.device
        and start < other.offset + _bytes(other)
        and other.offset < stop
        and buffer.offset != EXTERNAL
    ]


def _bytes(buffer: Buffer) -> int:
    return buffer.width * DTYPE_BYTES[buffer.dtype]


def _check_tensors(plan: Plan) -> None:
    sizes = [shard.size for shard in plan.checkpoint.shards]

    def inside(name: str, shard: int, offset: int, count: int) -> None:
        if shard == -1 and not sizes:
            return
        if not 0 <= shard < len(sizes) or offset + count > sizes[shard]:
            raise VerifyError(f"weight {name} lies outside its shard")

    for weight in plan.weights:
        inside(weight.name, weight.shard, weight.offset, weight.bytes)
        if weight.scale_dtype:
            inside(weight.name, weight.scale_shard, weight.scale_offset, weight.scale_bytes)
    for experts in plan.experts:
        columns = [("", experts.shards, experts.offsets, experts.bytes)]
        if experts.scale_dtype:
            columns.append(
                (" (scales)", experts.scale_shards, experts.scale_offsets, experts.scale_bytes)
            )
        for suffix, runs, offsets, count in columns:
            if len(offsets) != experts.count or sum(run for run, _ in runs) != experts.count:
                raise VerifyError(
                    f"experts {experts.pattern}{suffix}: columns are not one a expert"
                )
            places = list(accumulate(offsets))
            for length, shard in runs:
                part, places = places[:length], places[length:]
                if part and min(part) < 0:
                    raise VerifyError(f"experts {experts.pattern}{suffix}: a negative offset")
                inside(experts.pattern + suffix, shard, max(part, default=0), count)


def expand_runs(runs: tuple[tuple[int, int], ...]) -> Iterator[int]:
    """The values of run-length pairs (count, value), one by one."""
    for count, value in runs:
        for _ in range(count):
            yield value


def _check_placement(plan: Plan) -> None:
    counts = {experts.layer: experts.count for experts in plan.experts}
    placed = {placement.layer for placement in plan.placement}
    if placed != set(counts):
        raise VerifyError("placement: its layers are not the layers with routed experts")
    for placement in plan.placement:
        everyone = sorted(
            expert for text in placement.tiers.values() for expert in expert_ranges(text)
        )
        if everyone != list(range(counts[placement.layer])):
            raise VerifyError(
                f"placement of layer {placement.layer}: not every expert is in exactly one tier"
            )
