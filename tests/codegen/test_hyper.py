"""Hyper-connections against their blocks."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_calls import address, floats, guarded, in_turn, spec_of
from prefill_data import need

from hmc.blocks import HyperCopy, HyperIn, HyperOut, HyperWeights
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.ops.hyper import weights_of

TOKENS, WORKERS, EPS = 5, 3, 1e-6


def _run(
    jit: Jit, isa: str, op: str, params: dict[str, int], width: int, **values: object
) -> np.ndarray:
    """y of a kernel; arrays are given with rows that are one float longer than they need be."""
    y = guarded(np.zeros((TOKENS, width + 1), np.float32))
    given: dict[str, object] = {"y": address(y), "y_stride": width + 1, "tokens": TOKENS}
    for name, value in values.items():
        if isinstance(value, np.ndarray):
            given[name] = address(value)
            if value.ndim == 2:
                given[f"{name}_stride"] = value.shape[1]
        else:
            given[name] = value
    in_turn(jit, spec_of(op, isa, params), WORKERS, **given)
    assert not y[:, width:].any()
    return y[:, :width]


@pytest.mark.few(4)
@pytest.mark.parametrize(("parts", "iterations"), [(1, 0), (2, 0), (3, 1), (3, 20)])
@pytest.mark.parametrize("streams", [2, 4])
@pytest.mark.parametrize("isa", TIERS)
def test_weights(isa: str, streams: int, parts: int, iterations: int, jit: Jit) -> None:
    need(isa)
    rng, eps = np.random.default_rng(1), 1e-3 if parts == 2 else EPS
    block = HyperWeights(streams, parts, eps, iterations=iterations, magnitude=1.7)
    mixes = floats(rng, TOKENS, block.width + 1) * 3
    for name in ("base", "scale"):
        shape = getattr(block, name).shape
        getattr(block, name).copy_(torch.from_numpy(rng.standard_normal(shape, np.float32)))
    found = _run(
        jit, isa, "hyper_weights",
        {"streams": streams, "parts": parts, "iterations": iterations}, block.width, mixes=mixes,
        base=block.base.numpy(), scale=block.scale.numpy(), eps=eps, magnitude=1.7,
    )  # fmt: skip
    expected = block(torch.from_numpy(mixes[:, : block.width].copy())).numpy()
    np.testing.assert_allclose(found, expected, rtol=2e-5, atol=1e-6)


@pytest.mark.few(4)
@pytest.mark.parametrize(("width", "streams", "parts"), [(7, 2, 3), (512, 4, 2), (1100, 4, 3)])
@pytest.mark.parametrize("isa", TIERS)
def test_mixtures(isa: str, width: int, streams: int, parts: int, jit: Jit) -> None:
    need(isa)
    rng = np.random.default_rng(2)
    params = {"width": width, "streams": streams}
    h, x = floats(rng, TOKENS, width * streams + 1), floats(rng, TOKENS, width + 1)
    weights = floats(rng, TOKENS, weights_of(streams, parts))
    rows = [torch.from_numpy(each) for each in (h[:, :-1].copy(), weights, x[:, :-1].copy())]
    for op, block, given, expected in (
        ("hyper_in", HyperIn(width, streams, parts), {"h": h, "weights": weights}, rows[:2]),
        ("hyper_out", HyperOut(width, streams, parts), {"h": h, "weights": weights, "x": x}, rows),
        ("hyper_copy", HyperCopy(width, streams), {"x": x}, rows[2:]),
    ):
        sizes = params | ({"parts": parts} if op == "hyper_out" else {})
        found = _run(jit, isa, op, sizes, block.width, **given)
        np.testing.assert_allclose(found, block(*expected).numpy(), rtol=2e-5, atol=2e-5)
