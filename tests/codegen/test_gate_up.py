"""`gate_up` against float64, rows cut between any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from dealt import dealt
from decode_data import address_of_scale, as_multiplied, bound, stored_as, weights
from kernel_calls import address, filled, floats, guarded, in_turn
from kernel_meanings import gate_up
from prefill_data import activations, from_bf16, need

from hmc.codegen.checks import check_spec
from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import MAX_TOKENS, KernelSpec, WeightFormat
from hmc.errors import KernelError

_CLAMPED = "minimum(gate, 7.0)"
OAI = f"(minimum(maximum(up, -7.0), 7.0) + 1.0) * {_CLAMPED} * sigmoid(1.702 * {_CLAMPED})"
"""The clamped gate of gpt-oss."""
OTHERS = ("gelu_tanh(gate) * up", "gelu(gate) * up", OAI, "square(relu(gate))")


def assert_gated(y: np.ndarray, x: np.ndarray, gate: np.ndarray, up: np.ndarray) -> None:
    """`y` (bf16 bits) is silu(x gate) (x up) up to bf16 rounding and the f32 errors of the sums."""
    exact = gate_up(x, gate, up, SWIGLU)
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
    plain = KernelSpec.of(
        "gate_up", isa, weight=weight, out="bf16", expr=SWIGLU, k=k, tokens=MAX_TOKENS
    )
    spec = stored_as(plain, group)
    for rows, tokens, workers in [(1, 1, 1), (7, 3, 2), (130, 16, 3), (530, 2, 1), (257, 5, 4)]:
        gate, up = (weights(rng, weight, rows, k, group) for _ in range(2))
        x = guarded(activations(rng, tokens, k, k + 1))
        y = filled((tokens, rows + 1), np.uint16)
        in_turn(
            jit, spec, workers, x=address(x), x_stride=k + 1, gate=address(gate.data),
            gate_scale=address_of_scale(gate, weight), up=address(up.data),
            up_scale=address_of_scale(up, weight), y=address(y), y_stride=rows + 1, rows=rows,
            tokens=tokens, gate_bias=0, up_bias=0,
        )  # fmt: skip
        assert (y[:, rows] == 77).all()
        seen = as_multiplied(spec, from_bf16(x[:, :k]))
        assert_gated(y[:, :rows], seen, gate.values, up.values)


@pytest.mark.few(4)
@pytest.mark.parametrize("expr", OTHERS)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("isa", TIERS)
def test_other_activations(jit: Jit, isa: str, biased: bool, expr: str) -> None:
    """By both kernels, one token to several; sums of 40 products are larger than any clamp."""
    need(isa)
    rng, k, rows, tokens = np.random.default_rng(7), 40, 37, 5
    gate, up = (weights(rng, "bf16", rows, k, 0) for _ in range(2))
    x = guarded(activations(rng, tokens, k, k))
    biases = [floats(rng, rows) if biased else None for _ in range(2)]
    added = {"gate_bias": address(biases[0]), "up_bias": address(biases[1])}
    exact = gate_up(from_bf16(x), gate.values, up.values, expr, biases)
    more = {"biased": 1} if biased else {}
    sizes = {"k": k, "n": rows, "top_k": 1, "experts": 1, **more}
    many = KernelSpec.of("grouped_gate_up", isa, weight="bf16", out="bf16", expr=expr, **sizes)
    sizes = {"k": k, "tokens": tokens, **more}
    few = KernelSpec.of("gate_up", isa, weight="bf16", out="bf16", expr=expr, **sizes)
    y, act = (filled((tokens, rows), np.uint16) for _ in range(2))
    in_turn(
        jit, few, 2, x=address(x), x_stride=k, gate=address(gate.data), gate_scale=0,
        up=address(up.data), up_scale=0, y=address(y), y_stride=rows, rows=rows, tokens=tokens,
        **added,
    )  # fmt: skip
    table = np.array([[address(gate.data), 0, address(up.data), 0, 0, 0]], np.int64)
    slots, offsets = np.arange(tokens, dtype=np.int32), np.array([0, tokens], np.int32)
    scratch = np.zeros(2 * panel_scratch_bytes(many), np.uint8)
    in_turn(
        jit, many, 2, x=address(x), x_stride=k, slots=address(slots), offsets=address(offsets),
        table=address(table), act=address(act), scratch=address(scratch),
        routing=0, **added,
    )  # fmt: skip
    for found in (y, act):
        assert np.abs(from_bf16(found) - exact).max() <= 2.0**-8 * np.abs(exact).max()


@pytest.mark.parametrize("expr", ["", "silu(x0) * up", "gate < up", "sum(gate) * up", "gate *"])
def test_what_is_no_activation_is_refused(expr: str) -> None:
    spec = KernelSpec.of("gate_up", "avx2", weight="bf16", out="bf16", k=8, tokens=1, expr=expr)
    with pytest.raises(KernelError, match=r"expression|no value of gate and up"):
        check_spec(spec)
