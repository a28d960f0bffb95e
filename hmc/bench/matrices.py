"""Weight matrices to measure kernels on: random, laid out as the arena lays them, many enough that
a pass over all of them comes from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.bench.compare import Report, silent
from hmc.codegen.formats.weights import row_bytes
from hmc.codegen.spec import FP8_BLOCK
from hmc.errors import CapacityError, UsageError
from hmc.machine.detect import available_bytes
from hmc.runtime.memory.blocks import Block, aligned
from hmc.runtime.weights.fill import fill_dummy
from hmc.runtime.weights.store import TensorGroup

FORMATS = ("fp8", "bf16", "int4", "fp16", "f32")

Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MatrixShape:
    """Rows x K weights in a format, `group` of which share a scale in int4."""

    format: str
    rows: int
    k: int
    group: int = 0

    def __post_init__(self) -> None:
        if self.format == "int4" and self.k % self.group:
            raise UsageError(
                f"{self.rows}x{self.k}: int4 rows must be whole groups of {self.group} weights"
            )

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights."""
        return self.rows * row_bytes(self.format, self.k)

    @property
    def scale_bytes(self) -> int:
        """Bytes of the scales: f32 a block (fp8), bf16 a group (int4), else none."""
        if self.format == "fp8":
            return 4 * -(-self.rows // FP8_BLOCK) * -(-self.k // FP8_BLOCK)
        if self.format == "int4":
            return 2 * self.rows * (self.k // self.group)
        return 0

    @property
    def bytes(self) -> int:
        """All that a kernel reads of it."""
        return self.weight_bytes + self.scale_bytes

    @property
    def stride(self) -> int:
        """Bytes it takes in memory."""
        return aligned(self.weight_bytes) + aligned(self.scale_bytes)


class Matrices:
    """`count` sets of matrices of the given `shapes`, one set after the other in huge pages.

    `weights` and `scales` are addresses i64 [count, shapes]; scales are 0 where the format has
    none. `address` and `size` span them all.
    """

    def __init__(
        self, shapes: tuple[MatrixShape, ...], count: int, report: Report = silent
    ) -> None:
        self.shapes, self.count = shapes, count
        stride = sum(shape.stride for shape in shapes)
        self.set_bytes = sum(shape.bytes for shape in shapes)
        self.size = stride * count
        free = available_bytes()
        if self.size > free:
            raise CapacityError(
                f"{count} sets of weights need {self.size / 1e9:.1f} GB,"
                f" {free / 1e9:.1f} GB of memory are free: lower --megabytes"
            )
        self._block = Block(self.size, "weights to measure")
        self.address = self._block.address
        self.weights = np.zeros((count, len(shapes)), np.int64)
        self.scales = np.zeros((count, len(shapes)), np.int64)
        starts = self.address + stride * np.arange(count, dtype=np.int64)
        groups: list[TensorGroup] = []
        places: dict[tuple[str | int, ...], Addresses] = {}

        def place(name: str, size: int, at: Addresses, shape: MatrixShape) -> None:
            nowhere = np.zeros(count, np.int64)
            key = (name, len(groups))
            groups.append(TensorGroup(key, name, size, nowhere, nowhere, shape.k))
            places[key] = at

        for index, shape in enumerate(shapes):
            self.weights[:, index] = starts
            place(shape.format, shape.weight_bytes, starts, shape)
            if shape.scale_bytes:
                at = starts + aligned(shape.weight_bytes)
                self.scales[:, index] = at
                place(f"{shape.format} scale", shape.scale_bytes, at, shape)
            starts = starts + shape.stride
        fill_dummy(groups, places, report)

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()
