"""A few rows of weights times a few tokens, summed side by side: the innermost loops of decode
matmuls.

Chunks come in order and every chunk of a format with scales has a sum of its own, so a row's result
for a token is the same however many rows, tokens or chunks are under way at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from hmc.codegen.dot import Dot
from hmc.codegen.ir import F32, Emitter, Value, const


@dataclass
class Rows:
    """Rows at `bases` (i8*), their scales at `scales` (i8*, as `Dot.scale_row` gives them), times
    the prepared tokens `x` (i8*).

    `totals[row][token]` are slots of `<lanes x float>`; `seen[row]` of what is watched of a row
    (`Dot.watched`), where something is.
    """

    e: Emitter
    dot: Dot
    bases: list[Value]
    scales: list[Value]
    x: list[Value]
    totals: list[list[Value]] = field(default_factory=list)
    seen: list[Value] = field(default_factory=list)

    @staticmethod
    def at(e: Emitter, dot: Dot, w: Value, scale: Value, rows: list[Value], x: list[Value]) -> Rows:
        """`rows` (numbers, i64) of the matrix at `w` with scales at `scale`; totals are zero."""
        found = Rows(
            e,
            dot,
            [e.offset(w, e.b.mul(row, const(dot.row_bytes))) for row in rows],
            [dot.scale_row(e, scale, row) for row in rows] if dot.scaled else [],
            x,
        )
        zero = e.zeros(F32, dot.lanes)
        found.totals = [[found._slot(zero) for _ in x] for _ in rows]
        found.seen = [found._slot(dot.unseen(e)) for _ in rows] if dot.checked else []
        return found

    def _slot(self, value: Value) -> Value:
        slot = self.e.local(value.type)
        self.e.b.store(value, slot)
        return slot

    @property
    def ways(self) -> int:
        """Chunks summed up at once: one, or two where there are too few sums under way to hide the
        latency of a multiply-add.
        """
        few = self.dot.lanes == 8 and self.dot.scaled and not self.dot.whole
        return 2 if few and len(self.x) == 1 and len(self.bases) <= 2 else 1

    def add(self, ahead: Callable[[Value], None]) -> None:
        """Add all chunks; `ahead` is called with the element of each whole one before it."""
        size, k = self.dot.chunk, self.dot.k
        whole, step = k // size * size, size * self.ways
        with self.e.for_range(0, whole // step * step, step) as start:
            chunks = [self.e.b.add(start, const(way * size)) for way in range(self.ways)]
            for chunk in chunks:
                ahead(chunk)
            self._chunks(chunks, size)
        for at in range(whole // step * step, k, size):
            self._chunks([const(at)], min(size, k - at))

    def sums(self) -> list[list[Value]]:
        """Lanes of the finished sums, [row][token]; NaN where a row holds a code that is one."""
        found = [[self.e.b.load(total) for total in line] for line in self.totals]
        if self.dot.checked:
            return [
                self.dot.poisoned(self.e, line, self.e.b.load(slot))
                for line, slot in zip(found, self.seen, strict=True)
            ]
        return found

    def _chunks(self, chunks: list[Value], valid: int) -> None:
        """Add `valid` weights of each of the chunks at elements `chunks`."""
        e, b, dot = self.e, self.e.b, self.dot
        lines = [(r, chunk) for chunk in chunks for r in range(len(self.bases))]
        if dot.scaled:
            sums = [
                [self._slot(dot.start(e, token, chunk)) for token in self.x] for _, chunk in lines
            ]
        else:
            sums = [self.totals[r] for r, _ in lines]
        self._units(lines, sums, valid)
        if not dot.scaled:
            return
        for (r, chunk), line in zip(lines, sums, strict=True):
            factor = dot.scale(e, self.scales[r], chunk, valid)
            for token, slot, total in zip(self.x, line, self.totals[r], strict=True):
                value = dot.value(e, b.load(slot), token, chunk)
                b.store(e.fma(value, factor, b.load(total)), total)

    @property
    def _shared(self) -> bool:
        """Whether rows side by side share the loads of activations: there are registers for it."""
        return self.dot.lanes == 16 or (len(self.x) == 1 and self.ways == 1)

    def _units(self, lines: list[tuple[int, Value]], sums: list[list[Value]], valid: int) -> None:
        """Add `valid` weights of each of the `lines` (row, chunk) to `sums[line][token]`."""
        unit = self.dot.unit
        whole = valid // unit * unit
        if self.dot.lanes == 8 and len(self.x) > 1 and whole > 2 * unit:
            with self.e.for_range(0, whole, unit) as start:  # short, so that sums are in registers
                self._unit(lines, sums, start, unit)
        else:
            for at in range(0, whole, unit):
                self._unit(lines, sums, const(at), unit)
        if whole < valid:
            self._unit(lines, sums, const(whole), valid - whole)

    def _unit(
        self,
        lines: list[tuple[int, Value]],
        sums: list[list[Value]],
        start: Value,
        valid: int,
    ) -> None:
        """Add the unit at `start` in each of the `lines`."""
        e, b, dot = self.e, self.e.b, self.dot
        apart = [[i] for i in range(len(lines))]
        for group in [list(range(len(lines)))] if self._shared else apart:
            if group[0] and len(self.x) > 1:
                start = e.another(start)
            places = [b.add(lines[i][1], start) for i in group]
            weights = []
            for i, place in zip(group, places, strict=True):
                r = lines[i][0]
                codes = dot.load(e, self.bases[r], place, valid)
                if dot.checked:
                    b.store(dot.watched(e, b.load(self.seen[r]), codes), self.seen[r])
                weights.append(dot.decode(e, codes, len(self.x)))
            for t, prepared in enumerate(self.x):
                for step in range(len(weights[0])):
                    activations = dot.activations(e, prepared, places[0], step)
                    for i, row in zip(group, weights, strict=True):
                        total = dot.multiply(e, b.load(sums[i][t]), row[step], activations)
                        b.store(total, sums[i][t])
