"""A head that is screened: its compact copy, made natively when a plan is opened, its records, and
how many rows were computed (codegen/kernels/matmul/screen.py).

The program has both ways in, and a call takes one of them: records of the other have no tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from hmc.codegen.kernels.matmul.screen import COUNTS, PADDED, TOP
from hmc.codegen.kernels.routing.threshold import LEAST
from hmc.ops.screen import GROUP, MOST_BEST, copy_kernel
from hmc.plan import Step
from hmc.runtime.host.lowering import Lowering, Screen
from hmc.runtime.host.records import record


@dataclass(frozen=True)
class Compact:
    """Addresses of what is beside a matrix: codes i8 [n, k], scales bf16 [n, k / GROUP], norms f32
    [n].
    """

    codes: int
    scales: int
    norms: int


def screened_linear(low: Lowering, step: Step) -> None:
    """The matrix itself, then what its compact copy leaves of it."""
    specs, x, y = low.specs(step), step.inputs["x"], step.outputs["y"]
    weight, rows = step.weights["weight"], int(step.attrs["n"])
    stored = {"w": low.store.address(weight), "scale": 0, "bias": 0, "rows": rows}
    start = low.records
    whole = low.store.weight(weight).bytes
    record(low, step, specs["linear"], stored, shared=(whole, rows))
    middle, copy = low.records, _compact(low, step)
    given = stored | {"w": copy.codes, "scale": copy.scales}
    record(low, step, specs["screen"], given, shared=(step.weight_bytes, rows))
    stride = -(-rows // TOP // PADDED) * PADDED + PADDED
    best = np.zeros(low.arena.max_tokens, np.int32)
    counts = np.zeros((low.workers, COUNTS), np.int64)
    tops = np.full((low.arena.max_tokens, stride), LEAST, np.int32)
    given = stored | {
        "norms": copy.norms,
        "tops": low.tables.array(("tops", low.phase.name, step.id), tops),
        "tops_stride": stride,
        "best": low.tables.array(("best", low.phase.name, step.id), best),
        "counts": low.tables.array(("counts", low.phase.name, step.id), counts),
    }
    record(low, step, specs["screen_tops"], given, reads=[x, y], writes=["tops"])
    record(low, step, specs["screen_rows"], given, reads=[x, "tops"], writes=[y])
    low.screen = Screen((start, middle), (middle, low.records), best, counts, MOST_BEST)


def _compact(low: Lowering, step: Step) -> Compact:
    """Of the step's matrix, made when first asked for."""
    weight, rows, k = step.weights["weight"], int(step.attrs["n"]), int(step.attrs["k"])

    def make() -> tuple[npt.NDArray[np.generic], ...]:
        codes = np.empty((rows, k), np.int8)
        scales = np.empty((rows, k // GROUP), np.uint16)
        norms = np.empty(rows, np.float32)
        low.run(
            copy_kernel(low.plan.isa, low.store.weight(weight).format, k),
            w=low.store.address(weight),
            rows=rows,
            codes=codes.ctypes.data,
            scales=scales.ctypes.data,
            norms=norms.ctypes.data,
        )
        return codes, scales, norms

    return Compact(*low.tables.made(("compact", weight), make))
