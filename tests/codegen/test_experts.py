"""`experts_gate_up` and `experts_down` against float64, tokens sharing experts, any number of
workers.
"""

from __future__ import annotations

import threading
from dataclasses import replace

import numpy as np
import pytest
from decode_data import address_of_scale, as_multiplied, bound, stored_as, weights
from kernel_calls import address, filled, floats, guarded, in_turn
from kernel_meanings import experts_down, experts_gate_up
from prefill_data import Stored, activations, bf16, from_bf16, need
from test_gate_up import assert_gated

from hmc.codegen.expr import SWIGLU, has_gate
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.matmul.experts import scratch_bytes
from hmc.codegen.spec import KernelSpec, WeightFormat

TOKENS, TOP_K, EXPERTS = 16, 3, 20
FORMATS: list[tuple[WeightFormat, int, int, int]] = [
    ("fp8", 200, 130, 0),
    ("bf16", 64, 37, 0),
    ("int4", 96, 64, 32),
]
"""Format, hidden, intermediate, group."""


class Layer:
    """Random experts, the address table, and the two specs."""

    def __init__(
        self, isa: str, weight: WeightFormat, hidden: int, inner: int, group: int,
        act: str = SWIGLU, biased: bool = False, experts: int = EXPERTS, top_k: int = TOP_K,
    ) -> None:  # fmt: skip
        self.top_k = top_k
        self.rng = np.random.default_rng(hidden)
        shapes = [(inner, hidden), (inner, hidden), (hidden, inner)]
        self.experts: list[list[Stored]] = [
            [weights(self.rng, weight, n, k, group) for n, k in shapes] for _ in range(experts)
        ]
        self.hidden, self.inner = hidden, inner
        self.table = np.array(
            [
                [part for m in three for part in (address(m.data), address_of_scale(m, weight))]
                for three in self.experts
            ],
            np.int64,
        )
        if not has_gate(act):
            self.table[:, :2] = 0  # what nobody may read
        first = KernelSpec.of(
            "experts_gate_up",
            isa,
            weight=weight,
            out="bf16",
            k=hidden,
            n=inner,
            expr=act,
            top_k=top_k,
            experts=experts,
            tokens=TOKENS,
        )
        second = KernelSpec.of(
            "experts_down",
            isa,
            weight=weight,
            k=inner,
            n=hidden,
            top_k=top_k,
            experts=experts,
            tokens=TOKENS,
        )
        self.biases: list[np.ndarray] = []
        self.gated = has_gate(act)
        if biased:
            self.biases = [floats(self.rng, EXPERTS, n) for n, _ in shapes]
            first, second = (
                replace(spec, params=tuple(sorted((*spec.params, ("biased", 1)))))
                for spec in (first, second)
            )
        self.first, self.second = (stored_as(spec, group) for spec in (first, second))

    def values(self, part: int) -> list[np.ndarray]:
        """One matrix of every expert in f64: 0 gate, 1 up, 2 down."""
        return [three[part].values for three in self.experts]

    def choose(self, tokens: int) -> np.ndarray:
        """ids [tokens, TOP_K], many of them shared."""
        ids = [
            self.rng.permutation(EXPERTS // 2 if t % 2 else EXPERTS)[:TOP_K] for t in range(tokens)
        ]
        return guarded(np.array(ids, np.int32))

    def bias(self, part: int) -> np.ndarray | None:
        """f32 [EXPERTS, n]; none where there are none."""
        return self.biases[part] if self.biases else None

    def gate_up(
        self, jit: Jit, x: np.ndarray, ids: np.ndarray, workers: int,
        routing: np.ndarray | None = None, teams: np.ndarray | None = None,
    ) -> np.ndarray:  # fmt: skip
        """act [tokens * TOP_K, inner], bf16 bits."""
        act = filled((len(x) * self.top_k, self.inner), np.uint16)
        in_turn(
            jit, self.first, workers, x=address(x), x_stride=x.shape[1], ids=address(ids),
            table=address(self.table), act=address(act), tokens=len(x), scratch=0,
            routing=address(routing), gate_bias=address(self.bias(0) if self.gated else None),
            up_bias=address(self.bias(1)), teams=address(teams),
        )  # fmt: skip
        return act

    def down(
        self, jit: Jit, act: np.ndarray, ids: np.ndarray, routing: np.ndarray, workers: int
    ) -> np.ndarray:
        """y [tokens, hidden]."""
        y = filled((len(ids), self.hidden + 2), np.float32)
        scratch = guarded(np.zeros(scratch_bytes(self.second), np.uint8))
        in_turn(
            jit, self.second, workers, act=address(act), ids=address(ids),
            routing=address(routing), table=address(self.table), y=address(y),
            y_stride=self.hidden + 2, tokens=len(ids), scratch=address(scratch),
            bias=address(self.bias(2)),
        )  # fmt: skip
        assert (y[:, self.hidden :] == 77).all()
        return y[:, : self.hidden]


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("weight", "hidden", "inner", "group"), FORMATS)
def test_experts(
    jit: Jit, isa: str, weight: WeightFormat, hidden: int, inner: int, group: int
) -> None:
    need(isa)
    layer = Layer(isa, weight, hidden, inner, group)
    gate, up, down = (layer.values(part) for part in range(3))
    for tokens, workers in [(1, 1), (1, 2), (2, 5), (5, 3), (16, 2)]:
        x = guarded(activations(layer.rng, tokens, hidden, hidden + 3))
        ids = layer.choose(tokens)
        routing = floats(layer.rng, tokens, TOP_K)
        act = layer.gate_up(jit, x, ids, workers)
        exact_x = as_multiplied(layer.first, from_bf16(x[:, :hidden]))
        for pair, expert in enumerate(ids.reshape(-1)):
            token = pair // TOP_K
            assert_gated(act[pair : pair + 1], exact_x[token : token + 1], gate[expert], up[expert])

        inputs = guarded(bf16(layer.rng.standard_normal(act.shape)))
        exact_act = as_multiplied(layer.second, from_bf16(inputs))
        shares = routing.astype(np.float64)
        exact = experts_down(exact_act, ids, shares, down)
        slack = experts_down(np.abs(exact_act), ids, np.abs(shares), [np.abs(one) for one in down])
        y = layer.down(jit, inputs, ids, routing, workers)
        assert (np.abs(y - exact) <= 3e-6 * slack).all()


CLAMPED = (
    "minimum(gate, 7.0) * sigmoid(1.702 * minimum(gate, 7.0))"
    " * (minimum(maximum(up, -7.0), 7.0) + 1.0)"
)
WEIGHED = "silu(gate * weight) * (up * weight)"
UNGATED = "square(relu(up))"


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(
    ("act", "biased"),
    [(CLAMPED, True), (WEIGHED, False), (WEIGHED, True), (UNGATED, False), (UNGATED, True)],
)
@pytest.mark.parametrize(("weight", "hidden", "inner", "group"), FORMATS[1:])
def test_biases_and_weights_on_the_input(
    jit: Jit, isa: str, weight: WeightFormat, hidden: int, inner: int, group: int, act: str,
    biased: bool,
) -> None:  # fmt: skip
    need(isa)
    layer = Layer(isa, weight, hidden, inner, group, act, biased)
    gate, up, down = (layer.values(part) for part in range(3))
    for tokens, workers in [(1, 2), (7, 3)]:
        x = guarded(activations(layer.rng, tokens, hidden, hidden))
        ids, routing = layer.choose(tokens), floats(layer.rng, tokens, TOP_K)
        ids[-1, 0] = -1
        found = layer.gate_up(jit, x, ids, workers, routing)
        exact = experts_gate_up(
            as_multiplied(layer.first, from_bf16(x)), ids, gate, up, act, layer.biases[:2], routing
        )
        here = ids.reshape(-1) >= 0
        error = np.abs(from_bf16(found) - exact)[here]
        assert (error <= np.abs(exact[here]) * 2.0**-8 + 1e-3 * np.abs(exact).max()).all()
        inputs = guarded(bf16(layer.rng.standard_normal(found.shape)))
        y = layer.down(jit, inputs, ids, routing, workers)
        seen = as_multiplied(layer.second, from_bf16(inputs))
        wanted = experts_down(seen, ids, routing.astype(np.float64), down, layer.bias(2))
        assert np.abs(y - wanted).max() <= 1e-5 * np.abs(wanted).max()


@pytest.mark.few(1)
@pytest.mark.parametrize("act", [SWIGLU, UNGATED])
@pytest.mark.parametrize("isa", TIERS)
def test_a_token_is_the_same_alone_and_in_a_batch(jit: Jit, isa: str, act: str) -> None:
    need(isa)
    layer = Layer(isa, *FORMATS[0], act=act)
    x = guarded(activations(layer.rng, TOKENS, layer.hidden, layer.hidden))
    ids, routing = layer.choose(TOKENS), floats(layer.rng, TOKENS, TOP_K)
    act = layer.gate_up(jit, x, ids, workers=1)
    y = layer.down(jit, act, ids, routing, workers=1)
    for low, high in [(0, 1), (3, 5), (7, 16), (15, 16)]:
        part = slice(low, high)
        some = layer.gate_up(jit, guarded(x[part]), guarded(ids[part]), workers=high)
        np.testing.assert_array_equal(some, act[low * TOP_K : high * TOP_K])
        again = layer.down(jit, some, guarded(ids[part]), guarded(routing[part]), workers=high)
        np.testing.assert_array_equal(again, y[part])


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("weight", "hidden", "inner", "group"), FORMATS)
def test_slots_of_experts_elsewhere_add_nothing(
    jit: Jit, isa: str, weight: WeightFormat, hidden: int, inner: int, group: int
) -> None:
    """Two subsets of the experts give what all of them give; a token without a slot gives 0."""
    need(isa)
    layer = Layer(isa, weight, hidden, inner, group)
    for tokens, workers in [(1, 2), (7, 1), (16, 3)]:
        x = guarded(activations(layer.rng, tokens, hidden, hidden))
        ids = layer.choose(tokens)
        routing = floats(layer.rng, tokens, TOP_K)
        whole_act = layer.gate_up(jit, x, ids, workers)
        whole = layer.down(jit, whole_act, ids, routing, workers)
        total = np.zeros_like(whole)
        for low in (True, False):
            here = (ids < EXPERTS // 3) == low
            some = guarded(np.where(here, ids, -1).astype(np.int32))
            act = layer.gate_up(jit, x, some, workers)
            rows = here.reshape(-1)
            np.testing.assert_array_equal(act[rows], whole_act[rows])
            assert (act[~rows] == 77).all()
            act[~rows] = 0x7FC0  # NaN: what nobody may use
            y = layer.down(jit, act, some, routing, workers)
            assert (y[~here.any(axis=1)] == 0).all()
            exact = experts_down(
                as_multiplied(layer.second, from_bf16(whole_act)),
                some,
                routing.astype(np.float64),
                layer.values(2),
            )
            assert np.abs(y - exact).max() <= 1e-5 * np.abs(whole).max()
            total += y
        assert np.abs(total - whole).max() <= 1e-6 * np.abs(whole).max()


@pytest.mark.parametrize("isa", TIERS)
def test_no_slot_at_all(jit: Jit, isa: str) -> None:
    need(isa)
    layer = Layer(isa, *FORMATS[1])
    x = guarded(activations(layer.rng, 3, layer.hidden, layer.hidden))
    ids, routing = guarded(np.full((3, TOP_K), -1, np.int32)), floats(layer.rng, 3, TOP_K)
    act = layer.gate_up(jit, x, ids, workers=2)
    assert (act == 77).all()
    assert (layer.down(jit, act, ids, routing, workers=2) == 0).all()


def test_repeated_experts(jit: Jit) -> None:
    """Ids that a broken router might give: one expert in every slot."""
    need("avx2")
    layer = Layer("avx2", *FORMATS[1])
    x = guarded(activations(layer.rng, TOKENS, layer.hidden, layer.hidden))
    ids = guarded(np.full((TOKENS, TOP_K), 4, np.int32))
    act = layer.gate_up(jit, x, ids, workers=2)
    exact = experts_gate_up(from_bf16(x), ids, layer.values(0), layer.values(1), SWIGLU)
    assert np.abs(from_bf16(act) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    routing = floats(layer.rng, TOKENS, TOP_K)
    y = layer.down(jit, act, ids, routing, workers=2)
    wanted = experts_down(from_bf16(act), ids, routing, layer.values(2))
    limit = (
        bound(np.abs(from_bf16(act)), np.abs(layer.values(2)[4])).max()
        * TOP_K
        * np.abs(routing).max()
    )
    assert np.abs(y - wanted).max() <= limit


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", TIERS)
def test_many_experts_a_token(jit: Jit, isa: str) -> None:
    """22 of 24, wide ones, without gates: what a kernel keeps on its stack is little all the same,
    and ids that name one expert again and again are computed in parts.
    """
    need(isa)
    top_k, experts, inner = 22, 24, 5120
    layer = Layer(isa, "bf16", 16, inner, 0, UNGATED, experts=experts, top_k=top_k)
    x = guarded(activations(layer.rng, TOKENS, layer.hidden, layer.hidden))
    ids = np.stack([layer.rng.permutation(experts)[:top_k] for _ in range(TOKENS)])
    ids[3] = 5
    ids = guarded(ids.astype(np.int32))
    routing = floats(layer.rng, TOKENS, top_k)
    found: list[np.ndarray] = []

    def run() -> None:
        act = layer.gate_up(jit, x, ids, workers=2)
        found.extend((act, layer.down(jit, act, ids, routing, workers=2)))

    before = threading.stack_size(1 << 20)
    try:
        thread = threading.Thread(target=run)
        thread.start()
    finally:
        threading.stack_size(before)
    thread.join()
    act, y = found
    gate, up, down = (layer.values(part) for part in range(3))
    exact = experts_gate_up(as_multiplied(layer.first, from_bf16(x)), ids, gate, up, UNGATED)
    assert np.abs(from_bf16(act) - exact).max() <= 2.0**-8 * np.abs(exact).max()
    seen = as_multiplied(layer.second, from_bf16(act))
    wanted = experts_down(seen, ids, routing.astype(np.float64), down)
    assert np.abs(y - wanted).max() <= 1e-5 * np.abs(wanted).max()
