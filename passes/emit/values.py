"""Activations by name, of schedules whose buffers are not laid out yet, and which of them stand for
the buffers of the phase that a schedule is made from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from hmc.plan import DTYPE_BYTES, Buffer, DType, Operand, Phase, Step
from hmc.plan.model import EXTERNAL

_ALIGN = 64


@dataclass(frozen=True)
class Value:
    """An activation: `width` elements a token on a device; external ones belong to the engine.

    Where ranks share the tokens of a call, arenas are counted a token of one rank: a value that
    holds the tokens of all has `rows` of them for each.
    """

    name: str
    dtype: DType
    width: int
    device: str = "host"
    external: bool = False
    rows: int = 1

    @property
    def bytes(self) -> int:
        """Arena bytes a token of the rank."""
        return -(-self.width * DTYPE_BYTES[self.dtype] * self.rows // _ALIGN) * _ALIGN

    def buffer(self, name: str, offset: int) -> Buffer:
        """The buffer of a phase that holds it."""
        return Buffer(
            name=name, dtype=self.dtype, width=self.width, offset=offset, device=self.device
        )


@dataclass(frozen=True)
class Part:
    """Columns [column, column + width) of a value."""

    value: Value
    column: int
    width: int

    @staticmethod
    def all(value: Value) -> Part:
        """Every column."""
        return Part(value, 0, value.width)


Parts = Mapping[str, Part]
Attrs = Mapping[str, int | float | str]


@dataclass
class Bound:
    """The values that stand for the buffers of a base phase, by their names; those made here are
    called as the buffers, behind a `prefix`.
    """

    base: Phase
    prefix: str = ""
    values: dict[str, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._buffers = {buffer.name: buffer for buffer in self.base.buffers}

    def inputs(self, step: Step) -> dict[str, Part]:
        """What a step of the base phase reads; what no step wrote are the engine's own arrays."""
        return {role: self.part(operand, "host") for role, operand in step.inputs.items()}

    def outputs(self, step: Step, device: str, rows: int = 1) -> dict[str, Part]:
        """What it writes: values on a device, or those that it changes in place."""
        return {role: self.part(operand, device, rows) for role, operand in step.outputs.items()}

    def part(self, operand: Operand, device: str, rows: int = 1) -> Part:
        """An operand, of a new value on a device if its buffer has none yet."""
        value = self.values.get(operand.buffer)
        if value is None:
            found = self._buffers[operand.buffer]
            outside = found.offset == EXTERNAL
            # logits on a device: of the rows wanted, not of all
            name = self.prefix + found.name + ".device" * (outside and device != "host")
            value = Value(name, found.dtype, found.width, device, outside, rows)
            self.values[operand.buffer] = value
        return Part(value, operand.column, operand.width)
