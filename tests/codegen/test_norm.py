"""`norm`, `add_norm` and `add` against float64: f32 results within 1e-6 relative, bf16 within half
a bf16 step.
"""

from __future__ import annotations

import kernel_meanings as reference
import numpy as np
import pytest
from kernel_calls import address, as_format, filled, floats, from_bf16, in_turn
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec

EPS = 1e-6
BOUND = {"f32": 1e-6, "bf16": 2.0**-8}
"""Relative errors allowed."""


def assert_close(y: np.ndarray, exact: np.ndarray, out: str) -> None:
    """`y` as stored in `out` against float64."""
    values = from_bf16(y) if out == "bf16" else y
    assert (np.abs(values - exact) <= BOUND[out] * np.abs(exact) + 1e-30).all()


def run_norm(
    jit: Jit, spec: KernelSpec, x: np.ndarray, gamma: np.ndarray, groups: int, workers: int
) -> np.ndarray:
    """y [tokens, groups, width] as stored."""
    width = spec["width"]
    columns = groups * width
    y = filled((len(x), columns + 3), np.uint16 if spec.out == "bf16" else np.float32)
    in_turn(
        jit, spec, workers, x=address(x), x_stride=x.shape[1], gamma=address(gamma), y=address(y),
        y_stride=columns + 3, tokens=len(x), groups=groups, eps=EPS,
    )  # fmt: skip
    assert (y[:, columns:] == 77).all()
    return y[:, :columns].reshape(len(x), groups, width)


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("weight", "out"), [("bf16", "bf16"), ("f32", "f32"), ("fp16", "bf16")])
@pytest.mark.parametrize("width", [7, 100, 333])
def test_norm(jit: Jit, isa: str, weight: str, out: str, width: int) -> None:
    need(isa)
    rng = np.random.default_rng(width)
    gamma, factors = as_format(rng.standard_normal(width), weight)
    spec = KernelSpec.of("norm", isa, weight=weight, out=out, width=width)
    for tokens, groups in ((1, 1), (3, 5), (33, 2)):
        x = floats(rng, tokens, groups * width + 2)
        parts = x[:, : groups * width].reshape(tokens, groups, width)
        y = run_norm(jit, spec, x, gamma, groups, 1)
        assert_close(y, reference.norm(parts, factors, EPS), out)
        for workers in (2, 4):
            assert (run_norm(jit, spec, x, gamma, groups, workers) == y).all()
        alone = run_norm(jit, spec, x[-1:].copy(), gamma, groups, 1)
        assert (alone[0] == y[-1]).all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("out", ["f32", "bf16"])
@pytest.mark.parametrize("terms", [1, 2])
def test_add_norm_and_add(jit: Jit, isa: str, out: str, terms: int) -> None:
    need(isa)
    rng = np.random.default_rng(terms)
    width, tokens = 203, 5
    gamma, factors = as_format(rng.standard_normal(width), "bf16")
    h, *deltas = (floats(rng, tokens, width + 1) for _ in range(1 + terms))
    second = deltas[1] if terms == 2 else None
    total = reference.add(h[:, :width], *(delta[:, :width] for delta in deltas))
    common = {
        "h": address(h), "h_stride": width + 1, "d0": address(deltas[0]), "d0_stride": width + 1,
        "d1": address(second), "d1_stride": width + 1, "tokens": tokens,
    }  # fmt: skip
    spec = KernelSpec.of("add_norm", isa, weight="bf16", out=out, width=width)
    results = []
    for workers in (1, 2, 4):
        h_out = filled((tokens, width + 2), np.float32)
        y = filled((tokens, width + 3), np.uint16 if out == "bf16" else np.float32)
        in_turn(
            jit, spec, workers, **common, h_out=address(h_out), h_out_stride=width + 2,
            gamma=address(gamma), y=address(y), y_stride=width + 3, eps=EPS,
        )  # fmt: skip
        assert (h_out[:, width:] == 77).all()
        assert (y[:, width:] == 77).all()
        results.append((h_out.copy(), y.copy()))
        assert np.abs(h_out[:, :width] - total).max() < 1e-6
        # The sum is f32 by contract: its rounding is not the norm's.
        assert_close(y[:, :width], reference.norm(h_out[:, :width], factors, EPS), out)
    for h_out, y in results[1:]:
        assert (h_out == results[0][0]).all()
        assert (y == results[0][1]).all()
    sums = filled((tokens, width), np.float32)
    in_turn(
        jit, KernelSpec.of("add", isa, width=width), 2, **common, y=address(sums), y_stride=width
    )
    assert (sums == results[0][0][:, :width]).all()


@pytest.mark.parametrize("isa", TIERS)
def test_add_norm_in_place(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(3)
    gamma, factors = as_format(rng.standard_normal(50), "f32")
    h, d0 = floats(rng, 3, 50), floats(rng, 3, 50)
    total, _ = reference.add_norm(factors, EPS, h, d0)
    y = filled((3, 50), np.float32)
    spec = KernelSpec.of("add_norm", isa, weight="f32", width=50)
    in_turn(
        jit, spec, 2, h=address(h), h_stride=50, d0=address(d0), d0_stride=50, d1=0, d1_stride=0,
        h_out=address(h), h_out_stride=50, gamma=address(gamma), y=address(y), y_stride=50,
        tokens=3, eps=EPS,
    )  # fmt: skip
    assert np.abs(h - total).max() < 1e-6
    assert_close(y, reference.norm(h, factors, EPS), "f32")
