"""Columns in an order of their own: activations are gathered by it, and nothing else changes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from decode_data import bound
from format_ops import F32, OPS, Call, matrices, near, plain
from format_rows import Made, made
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import activations, from_bf16, need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.native import is_native
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import KernelSpec
from hmc.formats import FORMATS

ROWS, K, GROUP, TOKENS = 1000, 192, 64, 5
ORDERED = [row for row in FORMATS.values() if any(plane.kind == "order" for plane in row.planes)]


def multiplied(jit: Jit, op: str, isa: str, name: str, weight: Made, x: np.ndarray) -> np.ndarray:
    """x w^T by one matmul, two workers."""
    tokens = {"tokens": TOKENS} if op == "linear" else {}
    spec = KernelSpec.of(op, isa, weight=name, k=K, **tokens, **weight.params)
    assert is_native(spec)
    y, x = filled((TOKENS, ROWS), np.float32), guarded(x)
    more = {}
    if op == "gemm":
        scratch = np.zeros(2 * panel_scratch_bytes(spec), np.uint8)
        more = {"gather": 0, "scratch": address(scratch)}
    in_turn(
        jit, spec, 2, x=address(x), x_stride=K, w=weight.codes, scale=weight.beside, bias=0,
        y=address(y), y_stride=ROWS, rows=ROWS, tokens=TOKENS, **more,
    )  # fmt: skip
    return y


@pytest.mark.few(2)
@pytest.mark.parametrize("op", ["linear", "gemm"])
@pytest.mark.parametrize("isa", TIERS)
def test_products_are_those_of_gathered_activations(jit: Jit, isa: str, op: str) -> None:
    need(isa)
    rng = np.random.default_rng(1)
    ordered = made(rng, FORMATS["gptq-order"], ROWS, K, GROUP, keep=guarded)
    *planes, order = ordered.planes
    without = Made(tuple(planes), ordered.values, ordered.params, ordered.table[:-1].copy())
    x = activations(rng, TOKENS, K, K)
    found = multiplied(jit, op, isa, "gptq-order", ordered, x)
    gathered = x[:, order.reshape(-1)]
    assert np.array_equal(found, multiplied(jit, op, isa, "int4-zero", without, gathered))
    if TIERS[isa].pair_dot:  # others round activations
        seen, exact = from_bf16(x), ordered.values.astype(np.float64)
        assert (np.abs(found - seen @ exact.T) <= bound(seen, exact)).all()


@pytest.mark.few(2)
@pytest.mark.parametrize(("op", "isa"), list(product(OPS, TIERS)))
def test_every_matmul_with_orders_of_its_matrices(jit: Jit, op: str, isa: str) -> None:
    """Gate, up and experts have each its own."""
    need(isa)
    row = FORMATS["gptq8-order"]
    weights = matrices(op, row, seed=7)
    orders = {bytes(each.planes[-1]) for each in weights}
    assert len(orders) == len(weights)
    assert near(
        Call(jit, op, isa, row, weights).run(), Call(jit, op, isa, F32, plain(weights)).run()
    )


def test_formats_with_an_order_are_read_natively() -> None:
    assert len(ORDERED) == 4
    for row, isa in product(ORDERED, TIERS):
        assert is_native(KernelSpec.of("linear", isa, weight=row.kernels, k=K, tokens=1, group=64))
