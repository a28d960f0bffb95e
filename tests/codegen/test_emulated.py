"""A few kernels of the best tier on any machine, emulated where it lacks that; with
HMC_TEST_EMULATE=1 all tests of kernels do so.
"""

from __future__ import annotations

import numpy as np
import pytest
from decode_data import as_multiplied, bound, weights
from emulated import EmulatedJit
from format_ops import Call, matrices
from kernel_calls import guarded
from prefill_data import activations, from_bf16
from test_linear import run_linear, spec_of

from hmc.codegen.kernels import EMITTERS
from hmc.codegen.spec import KernelSpec, WeightFormat
from hmc.formats import FORMATS


@pytest.fixture(scope="module")
def emulating() -> EmulatedJit:
    return EmulatedJit(EMITTERS)


@pytest.mark.parametrize("weight", ["fp8", "bf16", "int4"])
def test_linear_of_the_best_tier(emulating: EmulatedJit, weight: WeightFormat) -> None:
    rng = np.random.default_rng(1)
    k = 328
    spec = spec_of("avx512_bf16", weight, k, group=128, tokens=3)
    matrix = weights(rng, weight, 21, k, 128)
    x = guarded(activations(rng, 3, k, k))
    exact = from_bf16(x) @ matrix.values.T
    y = run_linear(emulating, spec, x, matrix, workers=2)
    assert (np.abs(y - exact) <= bound(from_bf16(x), matrix.values)).all()


@pytest.mark.parametrize("name", ["q8_0", "q2_k"])
def test_blocks_in_whole_numbers(emulating: EmulatedJit, name: str) -> None:
    """Words of 16 bits, and bytes."""
    row = FORMATS[name]
    weights = matrices("linear", row)
    y, values = Call(emulating, "linear", "avx512_bf16", row, weights).run(), weights[0].values
    x = from_bf16(activations(np.random.default_rng(2), len(y), values.shape[1], values.shape[1]))
    spec = KernelSpec.of("linear", "avx512_bf16", weight=name, k=values.shape[1])
    seen = as_multiplied(spec, x)
    assert (np.abs(y - seen @ values.T) <= bound(seen, values)).all()
