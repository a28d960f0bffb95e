"""Order of a phase's steps: that each comes after what it needs, in its resource's order or through
an event. Hides vector clocks, and what lives in which bytes.

order       every read comes after the write it needs
reuse       bytes of an arena are not written while another buffer living there is still in use
slots       weights are used from a slot that a load filled with them before, and no load fills
            bytes that are in use, be it by another slot or by activations (ON and OFF events)
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Iterable

from hmc.errors import VerifyError
from hmc.plan.base import DTYPE_BYTES
from hmc.plan.model import EXTERNAL, Buffer, Phase, Slot, Step

_Clock = list[int]
"""By resource, the position of its last step known to be done."""
_Last = dict[int, int]
"""By resource, a position: of the last step there that did something."""


def check_order(phase: Phase) -> None:
    """Raise `VerifyError` where a step of a phase is not ordered after what it needs.

    `live` maps every buffer that holds a value to its writes and to all its uses, of each resource
    the last position; whoever takes over its bytes must come after them all, and ends its life.
    """
    numbers = {
        name: number for number, name in enumerate({step.resource: 0 for step in phase.steps})
    }
    clocks: list[_Clock] = []
    last_on = [-1] * len(numbers)
    signalled: dict[int, tuple[int, int]] = {}
    live: dict[str, tuple[_Last, _Last]] = {}
    slots = _Slots(phase)
    bytes_of: dict[str, _Bytes] = defaultdict(_Bytes)
    buffers = {buffer.name: buffer for buffer in phase.buffers}
    for position, step in enumerate(phase.steps):
        me = numbers[step.resource]
        previous = last_on[me]
        clock = clocks[previous].copy() if previous >= 0 else [-1] * len(numbers)
        clock[me] = previous
        for event in step.waits:
            if event not in signalled:
                raise VerifyError(
                    f"{_where(phase, step)}: waits for event {event}, which no earlier step signals"
                )
            resource, earlier = signalled[event]
            clock = list(map(max, clock, clocks[earlier]))
            clock[resource] = max(clock[resource], earlier)
        clocks.append(clock)
        last_on[me] = position
        if step.signal != -1:
            if step.signal < 0 or step.signal in signalled:
                raise VerifyError(f"{_where(phase, step)}: event {step.signal} is signalled twice")
            signalled[step.signal] = me, position
        for operand in step.inputs.values():
            name = operand.buffer
            if name not in live:
                if buffers[name].offset != EXTERNAL:
                    raise VerifyError(
                        f"{_where(phase, step)}: reads buffer {name} before anything wrote it"
                    )
                live[name] = ({}, {})
            if not _done(live[name][0], clock):
                raise VerifyError(
                    f"{_where(phase, step)}: reads buffer {name} without waiting for its write"
                )
        for operand in step.outputs.values():
            name = operand.buffer
            if name in live:
                if not _done(live[name][1], clock):
                    raise VerifyError(
                        f"{_where(phase, step)}: overwrites buffer {name} while it is in use"
                    )
            else:
                buffer = buffers[name]
                if buffer.offset != EXTERNAL:
                    for other in bytes_of[buffer.device].take(buffer):
                        if not _done(live[other][1], clock) or _reads(step, other):
                            raise VerifyError(
                                f"{_where(phase, step)}: {name} reuses bytes of {other} while it is"
                                " in use"
                            )
                        del live[other]
                    slots.cover(buffer, clock, step)
                live[name] = ({}, {})
            live[name][0][me] = live[name][1][me] = position
        for operand in step.inputs.values():
            if operand.buffer in live:
                live[operand.buffer][1][me] = position
        if step.uses:
            slots.use(step, me, position, clock)
        if step.fills:
            for device in slots.fill(step, me, position, clock):
                for name in bytes_of[device].drop():
                    if not _done(live[name][1], clock):
                        raise VerifyError(
                            f"{_where(phase, step)}: fills bytes of {name} while it is in use"
                        )
                    del live[name]


def _where(phase: Phase, step: Step) -> str:
    return f"phase {phase.name}, step {step.id} ({step.op})"


def _done(earlier: _Last, clock: _Clock) -> bool:
    """Whether the positions given, each the last of its resource, are known to be done."""
    for resource, position in earlier.items():  # noqa: SIM110 - called for every operand
        if clock[resource] < position:
            return False
    return True


def _reads(step: Step, name: str) -> bool:
    return any(operand.buffer == name for operand in step.inputs.values())


class _Bytes:
    """Which buffers live in the arena of one device: no two share bytes."""

    def __init__(self) -> None:
        self._places: list[tuple[int, int, str]] = []

    def take(self, buffer: Buffer) -> list[str]:
        """Let a buffer live; those whose bytes it takes are gone."""
        start = buffer.offset
        stop = start + buffer.width * DTYPE_BYTES[buffer.dtype]
        first = bisect_left(self._places, (start,))
        if first and self._places[first - 1][1] > start:
            first -= 1
        last = bisect_left(self._places, (stop,))
        gone = [name for _, _, name in self._places[first:last]]
        del self._places[first:last]
        insort(self._places, (start, stop, buffer.name))
        return gone

    def drop(self) -> list[str]:
        """End the life of all."""
        gone, self._places = [name for _, _, name in self._places], []
        return gone


class _Slots:
    """What the slots of a phase hold while its steps are walked, and who loaded and uses it."""

    def __init__(self, phase: Phase) -> None:
        self._phase = phase
        self._known = {slot.name: slot for slot in phase.slots}
        self._sharing = slots_sharing(phase.slots)
        self._over = {
            slot.name
            for slot in phase.slots
            if slot.offset + slot.bytes > phase.arena_at.get(slot.device, 0)
        }
        self._content: dict[str, frozenset[str]] = {}
        self._load: dict[str, _Last] = {}
        self._touched: dict[str, _Last] = {}

    def use(self, step: Step, me: int, position: int, clock: _Clock) -> None:
        """Check what a step reads from slots."""
        held: frozenset[str] = frozenset()
        for name in step.uses:
            self._check(name, step)
            if name not in self._load:
                raise VerifyError(
                    f"{_where(self._phase, step)}: uses slot {name} before anything filled it"
                )
            if not _done(self._load[name], clock):
                raise VerifyError(
                    f"{_where(self._phase, step)}: uses slot {name} without waiting for its load"
                )
            held |= self._content[name]
            self._touched[name][me] = position
        if missing := _content(step) - held:
            raise VerifyError(f"{_where(self._phase, step)}: its slots do not hold {min(missing)}")

    def fill(self, step: Step, me: int, position: int, clock: _Clock) -> set[str]:
        """Check what a step loads; the devices whose activations it overwrites."""
        for name in step.fills:
            self._check(name, step)
            for other in self._sharing[name]:
                self._end(other, clock, step)
            self._content[name] = _content(step)
            self._load[name], self._touched[name] = {me: position}, {me: position}
        return {self._known[name].device for name in step.fills if name in self._over}

    def cover(self, buffer: Buffer, clock: _Clock, step: Step) -> None:
        """Check a buffer that begins to live: it may lie over slots that reach into the arena."""
        for name in self._over:
            if self._known[name].device == buffer.device:
                self._end(name, clock, step)

    def _end(self, name: str, clock: _Clock, step: Step) -> None:
        if not _done(self._touched.get(name, {}), clock):
            raise VerifyError(f"{_where(self._phase, step)}: fills slot {name} while it is in use")
        for table in (self._content, self._load, self._touched):
            table.pop(name, None)

    def _check(self, name: str, step: Step) -> None:
        if name not in self._known:
            raise VerifyError(f"{_where(self._phase, step)}: slot {name} is not declared")


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
