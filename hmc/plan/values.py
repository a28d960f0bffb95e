"""Numbers the values that the phases of a plan compute, so that equal numbers are equal
computations: every phase must compute the same logits. Hides how schedules split, copy, gather and
add up what a model computes in one step.

A value's number stands for the op, its attributes, its layer, its weights, and the numbers and
columns of what it reads. What only moves rows passes numbers on; so does a sum of parts of one
value, as devices that hold some of the experts each make.
"""

from __future__ import annotations

from hmc.errors import VerifyError
from hmc.ops import OPS, kept_by
from hmc.plan.about import About
from hmc.plan.model import Operand, Phase, Step

_Piece = tuple[int, int, int, int]
"""Columns [first, last) of a buffer that hold a value, whose first column would be at `start`:
(first, last, number, start)."""


class Values:
    """Numbers shared by the phases of a plan."""

    def __init__(self) -> None:
        self._numbers: dict[tuple[object, ...], int] = {}
        self._logits: dict[str, int] = {}

    def begin(self) -> None:
        """A phase begins: no buffer holds anything."""
        self._held: dict[str, list[_Piece]] = {}
        self._kept: dict[int, dict[str, int | tuple[_Piece, ...]]] = {}
        """By layer, what its attention read, by role."""

    def step(self, step: Step, about: About) -> None:
        """Number what a step writes. `VerifyError` where it hands over other rows for the cache
        than those that the attention of its layer reads."""
        row = about.row
        if not step.outputs:
            if not row.moves:
                handed = {name: self._read(operand) for name, operand in step.inputs.items()}
                if not handed or not handed.items() <= self._kept.get(step.layer, {}).items():
                    raise VerifyError(f"its rows are not those that layer {step.layer} attends to")
            return
        if row.where == "gpu":  # tokens in another order: nothing that the model computes
            for operand in step.outputs.values():
                self._write(operand, -1)
            return
        if row.loose:
            for name, operand in step.outputs.items():
                source = step.inputs.get(name) or next(iter(step.inputs.values()))
                to, stop = operand.column - source.column, source.column + source.width
                pieces = [
                    (max(first, source.column) + to, min(last, stop) + to, number, start + to)
                    for first, last, number, start in self._pieces(source)
                ]
                self._put(operand, pieces)
            return
        reads = {name: self._read(operand) for name, operand in step.inputs.items()}
        if row.attends:
            self._check_kept(step, reads)
        if not step.weights and (row.picks or not (row.weights or row.attends)):
            taken = {next(iter(reads.values()))} if row.picks else set(reads.values())
            if len(taken) == 1 and isinstance(found := taken.pop(), int):
                for operand in step.outputs.values():
                    self._write(operand, found)
                return
        known = [each for each in reads.items() if each[1] != -1]
        key = (about.model, step.layer, *step.weights.values(), *known)
        for role, operand in step.outputs.items():
            self._write(operand, self._number((role, *key)))

    def _check_kept(self, step: Step, reads: dict[str, int | tuple[_Piece, ...]]) -> None:
        """Remember what attention reads; where an earlier layer keeps it for this one, that layer
        must have read the same."""
        layer = kept_by(step.attrs, step.layer)
        if layer == step.layer:
            self._kept[layer] = reads
            return
        found = self._kept.get(layer, {})
        roles = [role.name for role in OPS[step.op].inputs if role.rows == "all"]
        if any(found.get(role, -1) != reads[role] for role in roles if role in reads):
            raise VerifyError(f"layer {layer} keeps other rows than it reads")

    def finish(self, phase: Phase, logits: str) -> None:
        """`VerifyError` where a phase's logits are not one value, and that of the others."""
        pieces = self._held.get(logits, [])
        self._logits[phase.name] = pieces[0][2] if len(pieces) == 1 else -1
        first, wanted = next(iter(self._logits.items()))
        if self._logits[phase.name] != wanted or wanted < 0:
            raise VerifyError(
                f"phases {first} and {phase.name} compute different models: attributes, weights or"
                " operands of a step differ"
            )

    def _number(self, key: tuple[object, ...]) -> int:
        return self._numbers.setdefault(key, len(self._numbers))

    def _pieces(self, operand: Operand) -> list[_Piece]:
        """What an operand's columns hold; the engine's own arrays hold themselves."""
        held = self._held.get(operand.buffer)
        if held is None:
            name = operand.buffer.rpartition(".")[2]
            return [(operand.column, operand.column + operand.width, self._number((name,)), 0)]
        end = operand.column + operand.width
        return [each for each in held if each[0] < end and operand.column < each[1]]

    def _read(self, operand: Operand) -> int | tuple[_Piece, ...]:
        """The number of a whole value, or those of several parts with where they are."""
        column = operand.column
        end = column + operand.width
        held = self._held.get(operand.buffer)
        pieces = held if held is not None and len(held) == 1 else self._pieces(operand)
        if len(pieces) == 1:
            first, last, number, start = pieces[0]
            if first == start == column and last == end:
                return number
        return tuple(
            (max(first, column) - column, min(last, end) - column, number, start - column)
            for first, last, number, start in pieces
        )

    def _write(self, operand: Operand, number: int) -> None:
        column, last = operand.column, operand.column + operand.width
        self._put(operand, [(column, last, number, column)])

    def _put(self, operand: Operand, pieces: list[_Piece]) -> None:
        first, last = operand.column, operand.column + operand.width
        held = self._held.get(operand.buffer)
        if held is None:
            self._held[operand.buffer] = pieces
            return
        kept = []
        for a, b, number, start in held:
            if a < first:
                kept.append((a, min(b, first), number, start))
            if b > last:
                kept.append((max(a, last), b, number, start))
        self._held[operand.buffer] = sorted([*kept, *pieces]) if kept else pieces
