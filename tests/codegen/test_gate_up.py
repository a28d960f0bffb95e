"""`gate_up` against float64, rows cut between any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from dealt import dealt
from decode_data import address_of_scale, as_multiplied, bound, stored_as, weights
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import activations, from_bf16, need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import REFERENCES
from hmc.codegen.spec import MAX_TOKENS, KernelSpec, WeightFormat
from hmc.errors import KernelError


def assert_gated(y: np.ndarray, x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
    """`y` (bf16 bits) is silu(x gate) (x up) up to bf16 rounding and the f32 errors of the sums."""
    exact = REFERENCES["gate_up"](x, gate, up)
    g, u = x @ gate.T, x @ up.T
    slack = 1.2 * bound(x, gate) * np.abs(u) + bound(x, up) * np.abs(g) + 1e-37 * np.abs(g * u)
    assert (np.abs(from_bf16(y) - exact) <= 1.01 * 2.0**-8 * np.abs(exact) + slack).all()


@pytest.mark.parametrize(
    ("weight", "k", "group", "isa"),
    dealt([("fp8", 200, 0), ("bf16", 31, 0), ("fp16", 33, 0), ("int4", 100, 32)], TIERS),
)
def test_gate_up(jit: Jit, weight: WeightFormat, k: int, group: int, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(k)
    plain = KernelSpec.of("gate_up", isa, weight=weight, out="bf16", k=k, tokens=MAX_TOKENS, act=0)
    spec = stored_as(plain, group)
    for rows, tokens, workers in [(1, 1, 1), (7, 3, 2), (130, 16, 3), (530, 2, 1), (257, 5, 4)]:
        gate, up = (weights(rng, weight, rows, k, group) for _ in range(2))
        x = guarded(activations(rng, tokens, k, k + 1))
        y = filled((tokens, rows + 1), np.uint16)
        in_turn(
            jit, spec, workers, x=address(x), x_stride=k + 1, gate=address(gate.data),
            gate_scale=address_of_scale(gate, weight), up=address(up.data),
            up_scale=address_of_scale(up, weight), y=address(y), y_stride=rows + 1, rows=rows,
            tokens=tokens,
        )  # fmt: skip
        assert (y[:, rows] == 77).all()
        seen = as_multiplied(spec, from_bf16(x[:, :k]))
        assert_gated(y[:, :rows], seen, gate.values, up.values)


def test_other_activations_are_refused(jit: Jit) -> None:
    spec = KernelSpec.of("gate_up", "avx2", weight="bf16", out="bf16", k=8, tokens=1, act=1)
    with pytest.raises(KernelError, match="no activation 1"):
        jit.ir_text(spec)
