"""`route` against float64 (weights within 1e-6 relative) and the routers of transformers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from kernel_calls import address, filled, guarded, in_turn, spec_of
from kernel_meanings import route
from prefill_data import need
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    MixtralConfig,
    PhimoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter
from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from hmc.blocks.moe import chosen_by_table
from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.errors import KernelError

FORMS = [
    {"experts": 128, "top_k": 8, "scoring": 0, "normalise": 1},
    {"experts": 60, "top_k": 4, "scoring": 0, "normalise": 0},
    {"experts": 8, "top_k": 2, "scoring": 0, "normalise": 1},
    {"experts": 256, "top_k": 8, "scoring": 1, "normalise": 1, "groups": 8, "top_groups": 4},
    {"experts": 66, "top_k": 6, "scoring": 1, "normalise": 0, "groups": 3, "top_groups": 1},
    {"experts": 64, "top_k": 6, "scoring": 1, "normalise": 1},
    {"experts": 37, "top_k": 17, "scoring": 2, "normalise": 0},
    {"experts": 3, "top_k": 3, "scoring": 0, "normalise": 1},
    {"experts": 512, "top_k": 22, "scoring": 1, "normalise": 1, "eps": 1},
    {"experts": 160, "top_k": 6, "scoring": 0, "normalise": 0, "groups": 8, "top_groups": 3,
     "group_best": 1},
    {"experts": 128, "top_k": 1, "scoring": 3, "normalise": 0},
    {"experts": 60, "top_k": 19, "scoring": 3, "normalise": 1, "scaled": 1},
    {"experts": 16, "top_k": 2, "scoring": 4, "normalise": 0},
    {"experts": 100, "top_k": 4, "scoring": 4, "normalise": 1, "scaled": 1},
    {"experts": 256, "top_k": 6, "scoring": 5, "normalise": 1},
]  # fmt: skip
EPS, JITTER = 0.25, 0.1
"""What kernels are told; the first where a form has `eps`."""


def run(
    jit: Jit,
    isa: str,
    form: dict[str, int],
    logits: np.ndarray,
    bias: np.ndarray | None,
    workers: int,
    factor: float = 1.0,
) -> tuple[np.ndarray, np.ndarray]:
    """(ids, weights) of rows that are one float longer than they need be."""
    tokens, top_k = len(logits), form["top_k"]
    rows = guarded(np.pad(logits.astype(np.float32), ((0, 0), (0, 1)), constant_values=1e9))
    bias = None if bias is None else guarded(bias.astype(np.float32))
    ids, weights = filled((tokens, top_k), np.int32), filled((tokens, top_k), np.float32)
    scale = guarded(scales(form)) if "scaled" in form else None
    in_turn(
        jit, spec_of("route", isa, form), workers, logits=address(rows),
        logits_stride=rows.shape[1], bias=address(bias), ids=address(ids),
        routing=address(weights), tokens=tokens, factor=factor, eps=EPS, jitter=JITTER,
        scale=address(scale),
    )  # fmt: skip
    return ids, weights


def scales(form: dict[str, int]) -> np.ndarray:
    """Of every expert."""
    return np.random.default_rng(3).uniform(0.5, 2, form["experts"]).astype(np.float32)


def reference(
    form: dict[str, int], logits: np.ndarray, bias: np.ndarray | None, factor: float
) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64."""
    rest = {**form, "eps": EPS if "eps" in form else 1e-20, "jitter": JITTER}
    rest["scale"] = scales(form) if rest.pop("scaled", 0) else None
    del rest["experts"]
    return route(logits, bias, factor=factor, **rest)


@pytest.mark.few(14)
@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['scoring']}-{form['experts']}")
def test_every_form(jit: Jit, isa: str, form: dict[str, int]) -> None:
    need(isa)
    rng = np.random.default_rng(form["experts"])
    for tokens, biased in ((1, True), (3, False), (33, True)):
        logits = rng.standard_normal((tokens, form["experts"])).astype(np.float32) * 3
        bias = rng.random(form["experts"]).astype(np.float32) * 0.1 if biased else None
        ids, weights = run(jit, isa, form, logits, bias, 1, 2.5)
        exact_ids, exact = reference(form, logits, bias, 2.5)
        assert (ids == exact_ids).all()
        assert (np.abs(weights - exact) <= 1e-6 * exact).all()
        for workers in (2, 4):
            again = run(jit, isa, form, logits, bias, workers, 2.5)
            assert (again[0] == ids).all()
            assert (again[1] == weights).all()
        alone = run(jit, isa, form, logits[-1:], bias, 1, 2.5)
        assert (alone[1] == weights[-1:]).all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['scoring']}-{form['experts']}")
def test_ties_go_to_the_lower_id(jit: Jit, isa: str, form: dict[str, int]) -> None:
    need(isa)
    rng = np.random.default_rng(5)
    logits = rng.integers(0, 2, (16, form["experts"])).astype(np.float32)
    logits[0] = 0.0
    logits[1] = -0.0
    logits[1, ::2] = 0.0
    ids, _ = run(jit, isa, form, logits, None, 1)
    assert (ids == reference(form, logits, None, 1.0)[0]).all()


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("form", FORMS, ids=lambda form: f"{form['scoring']}-{form['experts']}")
def test_bad_logits_give_distinct_ids_in_range(jit: Jit, isa: str, form: dict[str, int]) -> None:
    need(isa)
    rng = np.random.default_rng(6)
    logits = rng.standard_normal((6, form["experts"])).astype(np.float32)
    logits[0] = np.nan
    logits[1, ::2] = np.nan
    logits[2] = -np.inf
    logits[3] = np.inf
    logits[4, 1:] = -3e38
    logits[5, 0] = 3e38
    ids, weights = run(jit, isa, form, logits, None, 1)
    assert (ids >= 0).all()
    assert (ids < form["experts"]).all()
    assert all(len(set(row)) == form["top_k"] for row in ids.tolist())
    assert np.isnan(weights[0]).all()
    assert np.isfinite(weights[4:]).all()


@pytest.mark.parametrize("isa", TIERS)
def test_experts_of_a_table(jit: Jit, isa: str) -> None:
    need(isa)
    rng = np.random.default_rng(8)
    experts, top_k, vocab, tokens = 20, 3, 11, 9
    logits = rng.standard_normal((tokens, experts)).astype(np.float32) * 3
    rows = guarded(np.pad(logits, ((0, 0), (0, 1)), constant_values=1e9))
    table = guarded(rng.random((vocab, experts)).argsort(1)[:, :top_k].astype(np.int32))
    token = guarded(rng.integers(0, vocab, tokens).astype(np.int32))
    ids, weights = filled((tokens, top_k), np.int32), filled((tokens, top_k), np.float32)
    form = {"experts": experts, "top_k": top_k, "scoring": 5, "normalise": 1}
    in_turn(
        jit, spec_of("hash_route", isa, form), 4, logits=address(rows),
        logits_stride=rows.shape[1], token=address(token), table=address(table),
        ids=address(ids), routing=address(weights), tokens=tokens, factor=1.5,
    )  # fmt: skip
    expected = chosen_by_table(
        {**form, "factor": 1.5}, torch.from_numpy(logits), torch.from_numpy(table[token])
    )
    assert (ids == expected[0].numpy()).all()
    np.testing.assert_allclose(weights, expected[1].numpy(), rtol=2e-6)


def test_as_transformers_routes(jit: Jit) -> None:
    rng = np.random.default_rng(7)
    x = torch.from_numpy(rng.standard_normal((33, 32)).astype(np.float32))
    deepseek = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=32, n_routed_experts=64, num_experts_per_tok=8, n_group=8, topk_group=3,
            norm_topk_prob=True, routed_scaling_factor=2.5,
        )
    )  # fmt: skip
    deepseek.e_score_correction_bias.copy_(torch.from_numpy(rng.random(64) * 0.3))
    qwen = Qwen3MoeTopKRouter(  # type: ignore[no-untyped-call]
        Qwen3MoeConfig(hidden_size=32, num_experts=128, num_experts_per_tok=8, norm_topk_prob=True)
    )
    mixtral = MixtralTopKRouter(  # type: ignore[no-untyped-call]
        MixtralConfig(hidden_size=32, num_local_experts=8, num_experts_per_tok=2)
    )
    grouped = {
        "experts": 64, "top_k": 8, "scoring": 1, "normalise": 1, "groups": 8, "top_groups": 3,
    }  # fmt: skip
    older = DeepseekV2TopkRouter(  # type: ignore[no-untyped-call]
        DeepseekV2Config(
            hidden_size=32, n_routed_experts=64, num_experts_per_tok=6, n_group=8, topk_group=3,
            topk_method="group_limited_greedy", routed_scaling_factor=2.0,
        )
    )  # fmt: skip
    by_best = {
        "experts": 64, "top_k": 6, "scoring": 0, "normalise": 0, "groups": 8, "top_groups": 3,
        "group_best": 1,
    }  # fmt: skip
    mixer = PhimoeTopKRouter(  # type: ignore[no-untyped-call]
        PhimoeConfig(hidden_size=32, num_local_experts=16, router_jitter_noise=JITTER)
    ).eval()
    for router, form, bias, factor in (
        (older, by_best, None, 2.0),
        (mixer, FORMS[12], None, 1.0),
        (deepseek, grouped, deepseek.e_score_correction_bias.numpy(), 2.5),
        (qwen, FORMS[0], None, 1.0),
        (mixtral, FORMS[2], None, 1.0),
    ):
        with torch.no_grad():
            router.weight.copy_(torch.from_numpy(rng.standard_normal(router.weight.shape)))
            logits, theirs, chosen = router(x)
        ids, weights = run(jit, "avx2", form, logits.numpy(), bias, 1, factor)
        order, their_order = np.argsort(ids, axis=1), np.argsort(chosen.numpy(), axis=1)
        ours = np.take_along_axis(weights, order, axis=1)
        assert (np.sort(ids, axis=1) == np.sort(chosen.numpy(), axis=1)).all()
        assert np.abs(ours - np.take_along_axis(theirs.numpy(), their_order, axis=1)).max() < 1e-6


@pytest.mark.parametrize(
    "wrong",
    [
        {"experts": 8, "top_k": 9, "scoring": 0},
        {"experts": 64, "top_k": 9, "scoring": 1, "groups": 8, "top_groups": 1},
        {"experts": 10, "top_k": 2, "scoring": 1, "groups": 4, "top_groups": 2},
        {"experts": 8, "top_k": 2, "scoring": 6},
        {"experts": 8, "top_k": 2, "scoring": 1, "groups": 4, "top_groups": 2, "group_best": 3},
    ],
)
def test_impossible_forms_are_refused(jit: Jit, wrong: dict[str, int]) -> None:
    with pytest.raises(KernelError, match="route"):
        jit.ir_text(spec_of("route", "avx2", wrong))
