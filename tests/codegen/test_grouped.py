"""Routed experts on many tokens against float64: ragged experts, every tier and format."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import pytest
from dealt import dealt
from kernel_meanings import experts_down, experts_gate_up, sort_experts
from prefill_data import (
    FORMATS,
    Stored,
    activations,
    address,
    as_packed,
    from_bf16,
    groups,
    need,
    run,
    stored,
)

from hmc.codegen.expr import SWIGLU
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.panel.tiling import panel_scratch_bytes
from hmc.codegen.spec import KernelSpec, WeightFormat

TOP_K = 3
EXPERTS = 7


def route(rng: np.random.Generator, tokens: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids [tokens, top_k] (expert 4 gets nothing, expert 1 much), then slots and offsets."""
    choice = [1, 0, 2, 3, 5, 6]
    ids = np.stack([rng.permutation(choice)[:TOP_K] for _ in range(tokens)])
    ids[: tokens // 2, 0] = 1
    slots, offsets = sort_experts(ids, EXPERTS)
    return ids, slots.astype(np.int32), offsets.astype(np.int32)


def table_of(experts: list[tuple[Stored, Stored, Stored]]) -> np.ndarray:
    return np.array(
        [[address(part) for w in three for part in (w.data, w.scale)] for three in experts],
        np.int64,
    )


def specs(
    isa: str, weight: WeightFormat, hidden: int, inner: int, tile: dict[str, int] | None = None,
    act: str = SWIGLU, **more: int,
) -> tuple[KernelSpec, KernelSpec]:  # fmt: skip
    of = partial(
        KernelSpec.of,
        isa=isa,
        weight=weight,
        top_k=TOP_K,
        experts=EXPERTS,
        **groups(weight, 32),
        tile=tile,
        **more,
    )
    return (
        of("grouped_gate_up", out="bf16", k=hidden, n=inner, expr=act),
        of("grouped_down", k=inner, n=hidden),
    )


def both(
    jit: Jit,
    pair: tuple[KernelSpec, KernelSpec],
    x: np.ndarray,
    routing: np.ndarray,
    slots: np.ndarray,
    offsets: np.ndarray,
    table: np.ndarray,
    workers: int,
    biases: Sequence[np.ndarray | None] = (None, None, None),
) -> tuple[np.ndarray, np.ndarray]:
    """act bf16 bits [tokens * top_k, inner] and y f32 [tokens, hidden]."""
    hidden, inner = pair[0]["k"], pair[0]["n"]
    act = np.full((len(x) * TOP_K, inner), 0x7FC0, np.uint16)
    y = np.full((len(x), hidden + 1), np.nan, np.float32)
    scratch = [np.full(workers * panel_scratch_bytes(spec), 0xFF, np.uint8) for spec in pair]
    shared = {"slots": address(slots), "offsets": address(offsets), "table": address(table)}
    run(
        jit, pair[0], workers, x=address(x), x_stride=x.shape[1], act=address(act),
        scratch=address(scratch[0]), routing=address(routing), gate_bias=address(biases[0]),
        up_bias=address(biases[1]), **shared,
    )  # fmt: skip
    run(
        jit, pair[1], workers, act=address(act), routing=address(routing), y=address(y),
        y_stride=hidden + 1, tokens=len(x), scratch=address(scratch[1]),
        bias=address(biases[2]), **shared,
    )  # fmt: skip
    assert np.isnan(y[:, hidden:]).all()
    return act, y[:, :hidden]


@pytest.mark.few(4)
@pytest.mark.parametrize(
    ("isa", "weight", "hidden", "inner"), dealt(TIERS, FORMATS, [(200, 130), (128, 33)])
)
def test_experts_against_float64(
    jit: Jit, isa: str, weight: WeightFormat, hidden: int, inner: int
) -> None:
    need(isa)
    rng = np.random.default_rng(hidden)
    experts = [
        (
            stored(rng, weight, inner, hidden, 32),
            stored(rng, weight, inner, hidden, 32),
            stored(rng, weight, hidden, inner, 32),
        )
        for _ in range(EXPERTS)
    ]
    table, pair = table_of(experts), specs(isa, weight, hidden, inner, {"tokens": 5})
    for tokens in (1, 17, 64):
        ids, slots, offsets = route(rng, tokens)
        routing = rng.uniform(0, 1, ids.shape).astype(np.float32)
        x = activations(rng, tokens, hidden, hidden + 2)
        act, y = both(jit, pair, x, routing, slots, offsets, table, workers=2)
        want = experts_gate_up(
            as_packed(pair[0], from_bf16(x[:, :hidden])),
            ids,
            [w[0].values for w in experts],
            [w[1].values for w in experts],
            SWIGLU,
        )
        # One rounding to bf16 (2^-9), and f32 sums of gate and up before it.
        error = np.abs(from_bf16(act) - want)
        assert (error <= np.abs(want) * 2.0**-8 + 1e-3 * np.abs(want).max()).all()
        seen, shares = as_packed(pair[1], from_bf16(act)), routing.astype(np.float64)
        down = experts_down(seen, ids, shares, [w[2].values for w in experts])
        assert np.abs(y - down).max() <= 1e-5 * np.abs(down).max()


@pytest.mark.few(2)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("biased", [False, True])
def test_biases_and_weights_on_the_input(jit: Jit, isa: str, biased: bool) -> None:
    need(isa)
    rng = np.random.default_rng(9)
    hidden, inner, tokens, act = 136, 45, 21, "gelu_tanh(gate * weight) * (up * weight)"
    shapes = ((inner, hidden),) * 2 + ((hidden, inner),)
    experts = [tuple(stored(rng, "bf16", *shape) for shape in shapes) for _ in range(EXPERTS)]
    biases = [rng.standard_normal((EXPERTS, n)).astype(np.float32) for n, _ in shapes]
    given = biases if biased else []
    more = {"biased": 1} if biased else {}
    pair = specs(isa, "bf16", hidden, inner, {"tokens": 5}, act, **more)
    ids, slots, offsets = route(rng, tokens)
    routing = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    x = activations(rng, tokens, hidden, hidden)
    table = table_of(experts)  # type: ignore[arg-type]
    found, y = both(jit, pair, x, routing, slots, offsets, table, 2, given or (None,) * 3)
    values = [[three[part].values for three in experts] for part in range(3)]
    exact_x = as_packed(pair[0], from_bf16(x))
    want = experts_gate_up(exact_x, ids, values[0], values[1], act, given[:2], routing)
    error = np.abs(from_bf16(found) - want)
    assert (error <= np.abs(want) * 2.0**-8 + 1e-3 * np.abs(want).max()).all()
    seen, shares = as_packed(pair[1], from_bf16(found)), routing.astype(np.float64)
    down = experts_down(seen, ids, shares, values[2], given[2] if given else None)
    assert np.abs(y - down).max() <= 1e-5 * np.abs(down).max()


@pytest.mark.few(2)
@pytest.mark.parametrize(
    ("isa", "weight", "inner"), dealt(TIERS, FORMATS, [(45,), (130,), (16,), (3,)])
)
@pytest.mark.parametrize("biased", [False, True])
def test_without_a_gate(jit: Jit, isa: str, weight: WeightFormat, inner: int, biased: bool) -> None:
    """No such matrix is read; any number of workers gives the same bits."""
    need(isa)
    rng = np.random.default_rng(inner)
    hidden, tokens, act = 160, 21, "square(relu(up))"
    inner = inner if weight in ("bf16", "fp8") else 64
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    experts = [tuple(stored(rng, weight, *shape, 32) for shape in shapes) for _ in range(EXPERTS)]
    biases = [None, *(rng.standard_normal((EXPERTS, n)).astype(np.float32) for n, _ in shapes[1:])]
    given = biases if biased else [None] * 3
    more = {"biased": 1} if biased else {}
    pair = specs(isa, weight, hidden, inner, {"tokens": 5}, act, **more)
    ids, slots, offsets = route(rng, tokens)
    routing = rng.uniform(0.1, 1, ids.shape).astype(np.float32)
    x = activations(rng, tokens, hidden, hidden)
    table = table_of(experts)  # type: ignore[arg-type]
    table[:, :2] = 0
    found, y = both(jit, pair, x, routing, slots, offsets, table, 1, given)
    values = [[three[part].values for three in experts] for part in range(3)]
    added = [np.zeros((EXPERTS, inner)), given[1]] if given[1] is not None else []
    exact_x = as_packed(pair[0], from_bf16(x))
    want = experts_gate_up(exact_x, ids, values[0], values[1], act, added, routing)
    error = np.abs(from_bf16(found) - want)
    assert (error <= np.abs(want) * 2.0**-8 + 1e-3 * np.abs(want).max()).all()
    seen, shares = as_packed(pair[1], from_bf16(found)), routing.astype(np.float64)
    down = experts_down(seen, ids, shares, values[2], given[2])
    assert np.abs(y - down).max() <= 1e-5 * np.abs(down).max()
    for workers in (2, 5):
        again = both(jit, pair, x, routing, slots, offsets, table, workers, given)
        assert all(np.array_equal(*two) for two in zip(again, (found, y), strict=True))


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", TIERS)
def test_any_number_of_workers_gives_the_same_bits(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(5)
    hidden, inner, tokens = 264, 72, 50
    experts = [
        tuple(stored(rng, "fp8", *shape) for shape in ((inner, hidden),) * 2 + ((hidden, inner),))
        for _ in range(EXPERTS)
    ]
    table, pair = table_of(experts), specs(isa, "fp8", hidden, inner)  # type: ignore[arg-type]
    ids, slots, offsets = route(rng, tokens)
    routing = rng.uniform(0, 1, ids.shape).astype(np.float32)
    x = activations(rng, tokens, hidden, hidden)
    alone = both(jit, pair, x, routing, slots, offsets, table, 1)
    for workers in (2, 3, 16):
        act, y = both(jit, pair, x, routing, slots, offsets, table, workers)
        assert np.array_equal(act, alone[0])
        assert np.array_equal(y, alone[1])


@pytest.mark.few(1)
@pytest.mark.parametrize("isa", TIERS)
def test_slots_of_experts_elsewhere_add_nothing(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(6)
    hidden, inner, tokens = 264, 72, 30
    shapes = ((inner, hidden),) * 2 + ((hidden, inner),)
    experts = [tuple(stored(rng, "fp8", *shape) for shape in shapes) for _ in range(EXPERTS)]
    table, pair = table_of(experts), specs(isa, "fp8", hidden, inner)  # type: ignore[arg-type]
    ids, slots, offsets = route(rng, tokens)
    routing = rng.uniform(0, 1, ids.shape).astype(np.float32)
    x = activations(rng, tokens, hidden, hidden)
    whole_act, whole = both(jit, pair, x, routing, slots, offsets, table, 2)
    total = np.zeros_like(whole)
    for here in (ids < 2, ids >= 2):
        some = np.where(here, ids, -1)
        slots, offsets = (part.astype(np.int32) for part in sort_experts(some, EXPERTS))
        assert len(slots) == here.sum()
        act, y = both(jit, pair, x, routing, slots, offsets, table, 2)
        assert np.array_equal(act[here.reshape(-1)], whole_act[here.reshape(-1)])
        assert (act[~here.reshape(-1)] == 0x7FC0).all()
        assert (y[~here.any(axis=1)] == 0).all()
        total += y
    assert np.abs(total - whole).max() <= 1e-5 * np.abs(whole).max()
