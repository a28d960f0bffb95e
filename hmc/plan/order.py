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
from hmc.plan.about import named
from hmc.plan.base import DTYPE_BYTES
from hmc.plan.model import EXTERNAL, Buffer, Phase, Slot, Step

_Clock = list[int]
"""By resource, the position of its last step known to be done."""
_Last = dict[int, int]
"""By resource, a position: of the last step there that did something."""


def check_order(phase: Phase) -> None:
    """Raise `VerifyError` where a step of a phase is not ordered after what it needs."""
    order = _Order(phase)
    try:
        for position, step in enumerate(phase.steps):
            order.check(step, position)
    except VerifyError as error:
        raise named(error, phase, step) from error


class _Order:
    """The steps of a phase in order: what is known to be done where each begins.

    `_live` maps every buffer that holds a value to its writes and to all its uses, of each resource
    the last position; whoever takes over its bytes must come after them all, and ends its life.
    """

    def __init__(self, phase: Phase) -> None:
        resources = dict.fromkeys(step.resource for step in phase.steps)
        self._numbers = {name: number for number, name in enumerate(resources)}
        self._clocks: list[_Clock] = []
        self._last_on = [-1] * len(resources)
        self._signalled: dict[int, tuple[int, int]] = {}
        self._live: dict[str, tuple[_Last, _Last]] = {}
        self._slots = _Slots(phase)
        self._bytes_of: dict[str, _Bytes] = defaultdict(_Bytes)
        self._buffers = {buffer.name: buffer for buffer in phase.buffers}

    def check(self, step: Step, position: int) -> None:
        """The next step."""
        me, live = self._numbers[step.resource], self._live
        clock = self._clock(step, me)
        self._clocks.append(clock)
        self._last_on[me] = position
        if step.signal != -1:
            if step.signal < 0 or step.signal in self._signalled:
                raise VerifyError(f"event {step.signal} is signalled twice")
            self._signalled[step.signal] = me, position
        for operand in step.inputs.values():
            name = operand.buffer
            if name not in live:
                if self._buffers[name].offset != EXTERNAL:
                    raise VerifyError(f"reads buffer {name} before anything wrote it")
                live[name] = ({}, {})
            if not _done(live[name][0], clock):
                raise VerifyError(f"reads buffer {name} without waiting for its write")
        for operand in step.outputs.values():
            name = operand.buffer
            if name not in live:
                self._begin(self._buffers[name], step, clock)
            elif not _done(live[name][1], clock):
                raise VerifyError(f"overwrites buffer {name} while it is in use")
            live[name][0][me] = live[name][1][me] = position
        for operand in step.inputs.values():
            if operand.buffer in live:
                live[operand.buffer][1][me] = position
        if step.uses:
            self._slots.use(step, me, position, clock)
        for device in self._slots.fill(step, me, position, clock) if step.fills else ():
            for name in self._bytes_of[device].drop():
                if not _done(live.pop(name)[1], clock):
                    raise VerifyError(f"fills bytes of {name} while it is in use")

    def _clock(self, step: Step, me: int) -> _Clock:
        """What is done when a step begins: before it on its resource, and before its events."""
        previous = self._last_on[me]
        clock = self._clocks[previous].copy() if previous >= 0 else [-1] * len(self._numbers)
        clock[me] = previous
        for event in step.waits:
            if event not in self._signalled:
                raise VerifyError(f"waits for event {event}, which no earlier step signals")
            resource, earlier = self._signalled[event]
            clock = list(map(max, clock, self._clocks[earlier]))
            clock[resource] = max(clock[resource], earlier)
        return clock

    def _begin(self, buffer: Buffer, step: Step, clock: _Clock) -> None:
        """A buffer begins to live, and ends the life of those whose bytes it takes."""
        if buffer.offset != EXTERNAL:
            for other in self._bytes_of[buffer.device].take(buffer):
                read = any(operand.buffer == other for operand in step.inputs.values())
                if read or not _done(self._live[other][1], clock):
                    raise VerifyError(f"{buffer.name} reuses bytes of {other} while it is in use")
                del self._live[other]
            self._slots.cover(buffer, clock)
        self._live[buffer.name] = ({}, {})


def _done(earlier: _Last, clock: _Clock) -> bool:
    """Whether the positions given, each the last of its resource, are known to be done."""
    for resource, position in earlier.items():  # noqa: SIM110 - called for every operand
        if clock[resource] < position:
            return False
    return True


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
            if name not in self._load:
                raise VerifyError(f"uses slot {name} before anything filled it")
            if not _done(self._load[name], clock):
                raise VerifyError(f"uses slot {name} without waiting for its load")
            held |= self._content[name]
            self._touched[name][me] = position
        if missing := _content(step) - held:
            raise VerifyError(f"its slots do not hold {min(missing)}")

    def fill(self, step: Step, me: int, position: int, clock: _Clock) -> set[str]:
        """Check what a step loads; the devices whose activations it overwrites."""
        for name in step.fills:
            for other in self._sharing[name]:
                self._end(other, clock)
            self._content[name] = _content(step)
            self._load[name], self._touched[name] = {me: position}, {me: position}
        return {self._known[name].device for name in step.fills if name in self._over}

    def cover(self, buffer: Buffer, clock: _Clock) -> None:
        """Check a buffer that begins to live: it may lie over slots that reach into the arena."""
        for name in self._over:
            if self._known[name].device == buffer.device:
                self._end(name, clock)

    def _end(self, name: str, clock: _Clock) -> None:
        if not _done(self._touched.get(name, {}), clock):
            raise VerifyError(f"fills slot {name} while it is in use")
        for table in (self._content, self._load, self._touched):
            table.pop(name, None)


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
