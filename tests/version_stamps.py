"""Fake memory that knows which step wrote every byte last, to catch steps that run too early.

Each step checks, when it begins and when it ends, that all it reads still holds exactly what
program order says, and then stamps what it writes with its position. Bytes are those of the
activation arenas and of the slots, so that what shares bytes is told apart; external buffers are
cells of their own. A slot that reaches into the activations covers all of them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from itertools import pairwise
from typing import Any

from hmc.plan import DTYPE_BYTES, Operand, Phase, Step
from hmc.plan.model import EXTERNAL


class Stamps:
    """Cells of one phase, and what its steps do to them."""

    def __init__(self, phase: Phase) -> None:
        self.phase = phase
        self._buffers = {buffer.name: buffer for buffer in phase.buffers}
        edges: dict[str, set[int]] = {}
        for step in phase.steps:
            for operand in (*step.inputs.values(), *step.outputs.values()):
                device, first, last = self._extent(operand)
                edges.setdefault(device, set()).update((first, last))
        self._slots = {slot.name: slot for slot in phase.slots}
        for slot in phase.slots:
            ends = (slot.offset, slot.offset + slot.bytes)
            edges.setdefault(f"slots of {slot.device}", set()).update(ends)
        self._edges = {device: sorted(places) for device, places in edges.items()}
        self._number: dict[tuple[str, int], int] = {}
        for device, places in self._edges.items():
            for first, _ in pairwise(places):
                self._number[device, first] = len(self._number)
        self.cells = [-1] * len(self._number)
        self._slow = self._ahead = -1
        self._overtaken = threading.Event()
        self._plan = self._expect()

    def reset(self) -> None:
        """Forget all writes."""
        self.cells[:] = [-1] * len(self.cells)

    def overtake(self, slow: int, ahead: int) -> None:
        """Let the step at `slow` go on only when the one at `ahead` is over, or after a second."""
        self._slow, self._ahead = slow, ahead

    def works(self) -> list[Callable[[Any], None]]:
        """What each step does, by position."""
        return [self._work(position) for position in range(len(self.phase.steps))]

    def _extent(self, operand: Operand) -> tuple[str, int, int]:
        buffer = self._buffers[operand.buffer]
        size = DTYPE_BYTES[buffer.dtype]
        outside = buffer.offset == EXTERNAL
        start = operand.column * size + (0 if outside else buffer.offset)
        return buffer.name if outside else buffer.device, start, start + operand.width * size

    def _of(self, operands: Any, slots: tuple[str, ...]) -> list[int]:
        found = []
        for slot in (self._slots[name] for name in slots):
            end = slot.offset + slot.bytes
            found += self._cells_of(f"slots of {slot.device}", slot.offset, end)
            if end > self.phase.arena_at[slot.device]:
                found += self._cells_of(slot.device, 0, max(self._edges[slot.device]))
        for operand in operands:
            found += self._cells_of(*self._extent(operand))
        return found

    def _cells_of(self, place: str, first: int, last: int) -> list[int]:
        return [self._number[place, at] for at in self._edges[place] if first <= at < last]

    def _expect(self) -> list[tuple[list[tuple[int, int]], list[int]]]:
        """For every step what it reads as (cell, stamp), and the cells it writes."""
        now = [-1] * len(self.cells)
        result = []
        for position, step in enumerate(self.phase.steps):
            reads = [(cell, now[cell]) for cell in self._of(step.inputs.values(), step.uses)]
            writes = self._of(step.outputs.values(), step.fills)
            for cell in writes:
                now[cell] = position
            result.append((reads, writes))
        return result

    def _work(self, position: int) -> Callable[[Any], None]:
        reads, writes = self._plan[position]
        cells = self.cells
        step: Step = self.phase.steps[position]

        def check(moment: str) -> None:
            for cell, stamp in reads:
                if cells[cell] != stamp:
                    raise AssertionError(
                        f"step {position} ({step.op}) {moment} on what step {cells[cell]} wrote,"
                        f" not step {stamp}"
                    )

        def work(call: Any) -> None:
            try:
                check("begins")
                if position == self._slow:
                    self._overtaken.wait(1.0)
                check("ends")
                for cell in writes:
                    cells[cell] = position
            finally:
                if position == self._ahead:
                    self._overtaken.set()

        return work
