"""`conv` against its reference in float64: taps, ragged widths, slots shared and apart, workers."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import floats, guarded
from prefill_data import need
from stateful import SLOTS, reference, run

from hmc.codegen.checks import check_spec
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec
from hmc.errors import KernelError


class Case:
    """Random operands of one kernel, and calls of it."""

    def __init__(self, isa: str, width: int, taps: int, tokens: int, act: str, bias: bool) -> None:
        rng = np.random.default_rng(width + taps)
        need(isa)
        sizes = {"width": width, "taps": taps} | ({"biased": 1} if bias else {})
        self.spec = KernelSpec.of("conv", isa, expr=act, **sizes)
        self.x = floats(rng, tokens, width + 3)
        self.weight, self.bias = rng.standard_normal((width, 1, taps)), floats(rng, width)
        self.weight = self.weight.astype(np.float32)
        self.state = rng.standard_normal((7, taps - 1, width), dtype=np.float32)
        self.attrs = {"width": width, "taps": taps, "act": act, "state": "conv"}

    def expected(self, slots: list[int]) -> tuple[np.ndarray, np.ndarray]:
        x = self.x[: len(slots), : self.spec["width"]]
        weights = {"weight": self.weight} | ({"bias": self.bias} if self.spec.get("biased") else {})
        return reference("conv", self.attrs, {"x": x}, weights, self.state, slots)

    def run(
        self, jit: Jit, slots: list[int], workers: int = 1, chunk: int = 0
    ) -> tuple[np.ndarray, np.ndarray]:
        taps = guarded(self.weight[:, 0].T)
        weights = {"weight": taps, "bias": self.bias}
        x = guarded(self.x[: len(slots)])
        return run(jit, self.spec, {"x": x}, weights, self.state, slots, workers, chunk)


@pytest.mark.few(6)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(
    ("width", "taps", "act", "bias"),
    [(7, 4, "silu(x)", True), (100, 3, "x", False), (33, 2, "silu(x) * 2.0", True),
     (16, 5, "x", True), (131, 8, "silu(x)", False), (1, 4, "silu(x)", False)],
)  # fmt: skip
def test_equals_the_reference(
    jit: Jit, isa: str, width: int, taps: int, act: str, bias: bool
) -> None:
    case = Case(isa, width, taps, 10, act, bias)
    for slots in SLOTS.values():
        y, state = case.run(jit, slots)
        exact, after = case.expected(slots)
        np.testing.assert_allclose(y, exact, rtol=2e-6, atol=4e-6)
        np.testing.assert_array_equal(state, after)
        for workers in (2, 3, 11):
            others = case.run(jit, slots, workers)
            assert all(map(np.array_equal, (y, state), others))


@pytest.mark.parametrize("isa", TIERS)
def test_chunks_equal_the_whole(jit: Jit, isa: str) -> None:
    case = Case(isa, 100, 4, 70, "silu(x)", False)
    for slots in ([4] * 70, [token // 9 % 7 for token in range(70)]):
        whole = case.run(jit, slots)
        for chunk in (1, 2, 7, 64):
            assert all(map(np.array_equal, whole, case.run(jit, slots, 2, chunk)))


@pytest.mark.parametrize(
    ("sizes", "expr"),
    [({"width": 8, "taps": 9}, "x"), ({"width": 8, "taps": 1}, "x"), ({"taps": 4}, "x"),
     ({"width": 8, "taps": 4}, "y"), ({"width": 8, "taps": 4}, "sum(x)")],
)  # fmt: skip
def test_what_does_not_fit_is_refused(sizes: dict[str, int], expr: str) -> None:
    with pytest.raises(KernelError, match=r"conv|expression"):
        check_spec(KernelSpec.of("conv", "avx2", expr=expr, **sizes))
