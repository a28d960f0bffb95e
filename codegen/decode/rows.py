"""A few rows of weights times a few tokens, summed side by side: the innermost loops of decode
matmuls.

Chunks come in order and every chunk of a format with scales has a sum of its own, so a row's result
for a token is the same however many rows or tokens are under way at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.planes import Row
from hmc.codegen.ir import Emitter, Value, const
from hmc.codegen.vector import for_blocks


@dataclass(frozen=True)
class Rows:
    """Some `rows` (as `Dot.row` gives them), times the prepared tokens `x` (i8*).

    `totals[row][token]` are slots of `<lanes x float>`.
    """

    e: Emitter
    dot: Dot
    rows: list[Row]
    x: list[Value]
    totals: list[list[Value]]

    def add(self, ahead: Callable[[Value], None]) -> None:
        """Add all chunks; `ahead` is called with the element of each whole one before it."""

        def chunk(start: Value, valid: int) -> None:
            if valid == self.dot.chunk:
                ahead(start)
            self._chunk(start, valid)

        for_blocks(self.e, self.dot.k, self.dot.chunk, chunk)

    def sums(self) -> list[list[Value]]:
        """Lanes of the finished sums, [row][token]."""
        e, b = self.e, self.e.b
        found = []
        for row, line in zip(self.rows, self.totals, strict=True):
            factor, sums = self.dot.whole(e, row), [b.load(total) for total in line]
            if factor is not None:
                sums = [b.fmul(total, e.splat(factor, self.dot.lanes)) for total in sums]
            found.append(sums)
        return found

    def _chunk(self, chunk: Value, valid: int) -> None:
        """Add `valid` weights of the chunk at element `chunk`."""
        e, b, dot = self.e, self.e.b, self.dot
        if not dot.scaled:
            self._units(chunk, self.totals, valid)
            return
        zeros = [dot.zero(e, row, chunk, valid) for row in self.rows]
        starts = [[dot.start(e, token, chunk, zero) for token in self.x] for zero in zeros]
        sums = [[e.local(start.type, start) for start in line] for line in starts]
        self._units(chunk, sums, valid)
        for at, (row, zero) in enumerate(zip(self.rows, zeros, strict=True)):
            factor = dot.scale(e, row, chunk, valid)
            for token, slot, total in zip(self.x, sums[at], self.totals[at], strict=True):
                value, before = dot.value(e, b.load(slot), token, chunk, zero), b.load(total)
                times = dot.token_factor(e, token, chunk) if factor is None else factor
                more = b.fadd(value, before) if times is None else e.fma(value, times, before)
                b.store(more, total)

    def _units(self, chunk: Value, sums: list[list[Value]], valid: int) -> None:
        """Add `valid` weights of the chunk at element `chunk` to `sums[row][token]`."""
        unit = self.dot.unit
        whole = valid // unit * unit
        if self.dot.registers < 32 and len(self.x) > 1 and whole > 2 * unit:
            with self.e.for_range(0, whole, unit) as start:  # short, so that sums are in registers
                self._unit(chunk, sums, start, unit)
        else:
            for at in range(0, whole, unit):
                self._unit(chunk, sums, const(at), unit)
        if whole < valid:
            self._unit(chunk, sums, const(whole), valid - whole)

    def _unit(self, chunk: Value, sums: list[list[Value]], start: Value, valid: int) -> None:
        """Add the unit at `start` of the chunk."""
        e, b, dot = self.e, self.e.b, self.dot
        rows = list(range(len(self.rows)))
        # Rows side by side share the loads of activations where there are registers for it.
        shared = dot.registers >= 32 or len(self.x) == 1
        for group in [rows] if shared else [[row] for row in rows]:
            if group[0] and len(self.x) > 1:
                start = e.another(start)
            place = b.add(chunk, start)
            weights = [
                dot.decode(e, dot.load(e, self.rows[row], place, valid), len(self.x))
                for row in group
            ]
            for t, prepared in enumerate(self.x):
                for step in range(len(weights[0])):
                    activations = dot.activations(e, prepared, place, step)
                    for row, vectors in zip(group, weights, strict=True):
                        total = dot.multiply(e, b.load(sums[row][t]), vectors[step], activations)
                        b.store(total, sums[row][t])
