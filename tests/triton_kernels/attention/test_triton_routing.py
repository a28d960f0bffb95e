"""Routing and sorting in Triton's interpreter, as devices do them with PyTorch."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from triton_paged import random

from hmc.ops.routing import Routing
from hmc.runtime.device_ops.moe import (
    SIGMOID,
    SIGMOID_CHOSEN,
    SOFTMAX,
    SOFTMAX_CHOSEN,
    SPARSEMIXER,
    routed,
)
from hmc.runtime.device_ops.triton import routing
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.device_ops.triton.routing import by_expert, route

INF, NAN = float("inf"), float("nan")


def compare(
    logits: torch.Tensor, bias: torch.Tensor | None, top_k: int, *about: int,
    scale: torch.Tensor | None = None, **more: float,
) -> None:  # fmt: skip
    """`about` and `more` are `Routing`'s."""
    ids = torch.full((len(logits), top_k), -7, dtype=torch.int32)
    weights = torch.empty(len(logits), top_k)
    form = Routing(*about, factor=2.5, **more)  # type: ignore[arg-type]
    route(logits, bias, scale, ids, weights, form)
    chosen, exact = routed(logits, None if bias is None else bias.float(), top_k, form)
    assert torch.equal(ids.long(), chosen)
    if scale is not None:
        exact *= scale.float()[chosen]
    assert torch.allclose(weights, exact * 2.5, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.few(3)
@pytest.mark.parametrize("scoring", [SOFTMAX, SIGMOID, SOFTMAX_CHOSEN, SIGMOID_CHOSEN, SPARSEMIXER])
@pytest.mark.parametrize("normalise", [False, True])
def test_every_scoring(scoring: int, normalise: bool, work: Workspace) -> None:
    logits = random(6, 64)[:, :60]
    compare(logits, None, 5, scoring, normalise, 0, 0)
    compare(logits, random(60, seed=1).to(torch.bfloat16), 1, scoring, normalise, 0, 0)
    scale = random(60, seed=2).to(torch.bfloat16)
    compare(logits, None, 19, scoring, normalise, 0, 0, scale=scale, eps=0.2, jitter=0.2)


def test_many_of_very_many(work: Workspace) -> None:
    compare(random(3, 512), random(512, seed=1), 22, SIGMOID, True, 0, 0)


@pytest.mark.parametrize(("experts", "groups", "top_groups"), [(256, 8, 4), (60, 5, 3), (6, 3, 1)])
def test_experts_of_the_best_groups(
    experts: int, groups: int, top_groups: int, work: Workspace
) -> None:
    bias = random(experts, seed=1)
    compare(random(5, experts), bias, 2, SIGMOID, True, groups, top_groups)
    compare(random(5, experts), None, 2, SOFTMAX, False, groups, top_groups, group_best=1)


@pytest.mark.filterwarnings("ignore:(All-NaN|invalid value):RuntimeWarning")
def test_ties_and_what_is_no_number(work: Workspace) -> None:
    logits = torch.zeros(7, 8)
    logits[0] = torch.tensor([1.0, 3.0, 3.0, -0.0, 0.0, 3.0, 1.0, 2.0])
    logits[1, 2:] = -INF
    logits[2, 3] = NAN
    logits[3] = NAN
    logits[4] = -INF
    logits[5, 1], logits[5, 6] = INF, -INF
    for scoring in (SOFTMAX, SIGMOID, SOFTMAX_CHOSEN):
        for top_groups in (0, 2):
            compare(logits, None, 3, scoring, True, 4, top_groups)
    bias = torch.tensor([0.0, INF, NAN, -INF, 0.5, 0.5, -0.0, INF])
    compare(logits, bias, 4, SIGMOID, False, 2, 1)


@pytest.mark.few(3)
@pytest.mark.parametrize("few", [True, False])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(("slots", "experts"), [(1, 1), (37, 5), (700, 100)])
def test_slots_by_expert(
    few: bool, dtype: torch.dtype, slots: int, experts: int, work: Workspace,
    backwards: Callable[[], None], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if not few:
        monkeypatch.setattr(routing, "FEW", 0)
    seeded = torch.Generator().manual_seed(slots)
    ids = torch.randint(-1, experts, (slots,), generator=seeded, dtype=torch.int32)
    found, wanted = ids.sort(stable=True)
    for _ in range(2):
        order = torch.full((slots,), -1, dtype=dtype)
        edges = torch.full((experts + 1,), -1, dtype=dtype)
        by_expert(ids, order, edges, work)
        assert torch.equal(order.long(), wanted)
        assert torch.equal(edges.long(), torch.searchsorted(found, torch.arange(experts + 1)))
        assert not work.counters.any()
        backwards()
