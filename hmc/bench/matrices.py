"""Weight matrices to measure kernels on: random, laid out as the arena lays them, many enough that
a pass over all of them comes from memory.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.bench.compare import Report, silent
from hmc.errors import CapacityError, UsageError
from hmc.formats import FORMATS, Form, format_of, forms, kernel_params
from hmc.machine.detect import available_bytes
from hmc.runtime.memory.blocks import Block, aligned
from hmc.runtime.weights.fill import fill_dummy
from hmc.runtime.weights.tensors import TensorGroup

__all__ = ["FORMATS", "Matrices", "MatrixShape"]

Addresses = npt.NDArray[np.int64]


@dataclass(frozen=True)
class MatrixShape:
    """Rows x K weights in a format, `group` of which share a scale where it is grouped."""

    format: str
    rows: int
    k: int
    group: int = 0

    def __post_init__(self) -> None:
        if not format_of(self.format).whole_groups(self.k, self.group):
            raise UsageError(
                f"{self.rows}x{self.k}: {self.format} rows must be whole groups of {self.group}"
                " weights"
            )

    @property
    def dtypes(self) -> tuple[str, ...]:
        """Stored dtype of each plane: the usual ones."""
        return tuple(plane.dtypes[0] for plane in format_of(self.format).planes)

    @property
    def params(self) -> dict[str, int]:
        """What kernels must know of it besides its format."""
        return kernel_params(format_of(self.format), self.group, self.dtypes)

    @property
    def forms(self) -> tuple[Form, ...]:
        """Its planes."""
        return forms(format_of(self.format), (self.rows, self.k), self.group, self.dtypes)

    @property
    def bytes(self) -> int:
        """All that a kernel reads of it."""
        return sum(form.bytes for form in self.forms)

    @property
    def stride(self) -> int:
        """Bytes it takes in memory."""
        return sum(aligned(form.bytes) for form in self.forms)


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
        nowhere = np.zeros(count, np.int64)
        for index, shape in enumerate(shapes):
            for form, column in zip(shape.forms, (self.weights, self.scales), strict=False):
                column[:, index] = starts
                key = (form.plane.name, index)
                groups.append(TensorGroup(key, shape.format, form, nowhere, nowhere, shape.k))
                places[key] = starts
                starts = starts + aligned(form.bytes)
        fill_dummy(groups, places, report)

    def close(self) -> None:
        """Give the memory back."""
        self._block.close()
