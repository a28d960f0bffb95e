"""`selective_scan` against its reference in float64: states, ragged widths, slots shared and apart,
workers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import floats, guarded
from prefill_data import need
from stateful import SLOTS, reference, run

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec

Result = tuple[np.ndarray, np.ndarray]


class Case:
    """Random operands of one kernel, and calls of it."""

    def __init__(self, isa: str, width: int, states: int, tokens: int) -> None:
        rng = np.random.default_rng(width + states)
        need(isa)
        self.spec = KernelSpec.of("selective_scan", isa, width=width, states=states)
        columns = {"x": width, "dt": width, "b": states, "c": states}
        self.inputs = {role: floats(rng, tokens, count + 1) for role, count in columns.items()}
        self.inputs["dt"][...] = np.log1p(np.exp(self.inputs["dt"]))
        self.a_log = np.log(1 + states * rng.random((width, states))).astype(np.float32)
        self.state = rng.standard_normal((7, states, width), dtype=np.float32)
        self.columns = columns

    def expected(self, slots: list[int]) -> Result:
        inputs = {
            role: array[: len(slots), : self.columns[role]] for role, array in self.inputs.items()
        }
        attrs = {name: self.spec[name] for name in ("width", "states")} | {"log": 1}
        weights = {"a": self.a_log}
        return reference("selective_scan", attrs, inputs, weights, self.state, slots)

    def run(self, jit: Jit, slots: list[int], workers: int = 1, chunk: int = 0) -> Result:
        rate = guarded(-np.exp(self.a_log.T))
        inputs = {role: guarded(array[: len(slots)]) for role, array in self.inputs.items()}
        return run(jit, self.spec, inputs, {"rate": rate}, self.state, slots, workers, chunk)


@pytest.mark.few(6)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("width", "states"), [(100, 16), (7, 3), (33, 12), (64, 1), (1, 40)])
def test_equals_the_reference(jit: Jit, isa: str, width: int, states: int) -> None:
    case = Case(isa, width, states, 10)
    for slots in SLOTS.values():
        y, state = case.run(jit, slots)
        exact, after = case.expected(slots)
        np.testing.assert_allclose(y, exact, rtol=1e-5, atol=1e-5 * states**0.5)
        np.testing.assert_allclose(state, after, rtol=1e-5, atol=1e-5)
        for workers in (2, 3, 11):
            assert all(map(np.array_equal, (y, state), case.run(jit, slots, workers)))


@pytest.mark.parametrize("isa", TIERS)
def test_chunks_equal_the_whole(jit: Jit, isa: str) -> None:
    case = Case(isa, 50, 16, 70)
    for slots in ([4] * 70, [token // 9 % 7 for token in range(70)]):
        whole = case.run(jit, slots)
        for chunk in (1, 7, 64):
            assert all(map(np.array_equal, whole, case.run(jit, slots, 2, chunk)))


@pytest.mark.parametrize("isa", TIERS)
def test_long_steps_forget_all(jit: Jit, isa: str) -> None:
    """What a decay of exp(-1000) leaves of a state is 0, not NaN."""
    case = Case(isa, 20, 16, 4)
    case.inputs["dt"][...] = 1000.0
    y, state = case.run(jit, [1] * 4)
    exact, after = case.expected([1] * 4)
    np.testing.assert_allclose(y, exact, rtol=1e-5, atol=0.05)
    np.testing.assert_allclose(state, after, rtol=1e-5)
