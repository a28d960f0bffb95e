"""The shared vector functions, through a kernel of their own: y = f(h), in the argument layout of
`add`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from emulated import new_jit
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import need

from hmc.codegen import vector
from hmc.codegen.ir import F32, Emitter, Value
from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec


def probe(function: Callable[[Emitter, Value], Value], isa: str, x: np.ndarray) -> np.ndarray:
    """function(x) of an f32 row; the spec carries the function's name, or the cache would mix them
    up.
    """
    name = int.from_bytes(function.__name__.encode(), "big") % 2**31

    def emit(spec: KernelSpec) -> str:
        e = Emitter(spec)
        lanes = TIERS[spec.isa].lanes

        def strip(index: Value, count: int, way: int) -> None:
            value = vector.load_part(e, e.arg["h"], index, F32, count, lanes)
            vector.store_part(e, function(e, value), e.arg["y"], index, count)

        vector.for_strips(e, spec["width"], lanes, strip)
        return e.finish()

    x = guarded(x.astype(np.float32))
    y = filled(x.shape, np.float32)
    spec = KernelSpec.of("add", isa, width=len(x), probe=name)
    in_turn(
        new_jit({"add": emit}), spec, 1, h=address(x),
        h_stride=0, d0=0, d0_stride=0, d1=0, d1_stride=0, y=address(y), y_stride=0, tokens=1,
    )  # fmt: skip
    return y


@pytest.mark.parametrize("isa", TIERS)
def test_exp_to_2e_7(isa: str) -> None:
    need(isa)
    x = np.concatenate([np.linspace(-87.3, 88.3, 40001), [0.0, -0.0, 1e-30]]).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (np.abs(probe(vector.exp, isa, x) - exact) <= 2e-7 * exact).all()


@pytest.mark.parametrize("isa", TIERS)
def test_exp_at_the_ends(isa: str) -> None:
    need(isa)
    x = np.array([-88.0, -1000.0, -np.inf, 89.0, np.inf, np.nan])
    y = probe(vector.exp, isa, x)
    assert (y[:3] == 0).all()
    assert (np.abs(y[3:5] / np.exp(88.37) - 1) < 1e-5).all()
    assert np.isnan(y[5])


@pytest.mark.parametrize("isa", TIERS)
def test_sigmoid_to_3e_7(isa: str) -> None:
    need(isa)
    x = np.linspace(-80, 100, 5003).astype(np.float32)
    exact = 1 / (1 + np.exp(-x.astype(np.float64)))
    assert (np.abs(probe(vector.sigmoid, isa, x) - exact) <= 3e-7 * exact).all()
