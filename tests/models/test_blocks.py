"""Blocks against their formulas in float64, and the fused forms against what they replace."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import numpy as np
import pytest
import torch
from kernel_meanings import Options, attention_prefill
from torch import Tensor
from torch.nn import functional

from hmc.blocks import (
    MLA,
    AddNorm,
    Attention,
    Block,
    Columns,
    Experts,
    GateUp,
    Growth,
    Linear,
    RMSNorm,
    Rotary,
    Route,
    Scoring,
)
from hmc.ops import OPS


def _filled(block: Block, seed: int = 0) -> Block:
    generator = torch.Generator().manual_seed(seed)
    for parameter in block.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return block


def _random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


def test_norm_of_groups() -> None:
    norm = _filled(RMSNorm(7, 1e-3, groups=3))
    x = _random(5, 21)
    result = norm(x)
    for group in range(3):
        part = x[:, 7 * group : 7 * group + 7].double()
        expected = part / (part.square().mean(-1, keepdim=True) + 1e-3).sqrt()
        expected = expected * norm.get_parameter("gamma").double()
        _close(result[:, 7 * group : 7 * group + 7], expected)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_turns_each_pair(interleaved: bool) -> None:
    frequencies = (1.0, 0.3, 0.05)
    rotary = Rotary(2, 9, frequencies, start=2, interleaved=interleaved, factor=1.25)
    x, positions = _random(4, 18), torch.tensor([0, 1, 7, 90])
    result = rotary(x, positions)
    for token, position in enumerate(positions.tolist()):
        for head in range(2):
            base = 9 * head
            expected = x[token, base : base + 9].double().tolist()
            for i, frequency in enumerate(frequencies):
                a, b = (2 + 2 * i, 3 + 2 * i) if interleaved else (2 + i, 5 + i)
                turn = complex(expected[a], expected[b]) * 1.25
                angle = position * frequency
                turn *= complex(math.cos(angle), math.sin(angle))
                expected[a], expected[b] = turn.real, turn.imag
            _close(result[token, base : base + 9], torch.tensor(expected))


def test_rotary_with_norm_is_norm_then_rotary() -> None:
    norm = RMSNorm(8, 1e-5, groups=3)
    _filled(norm)
    rotary = Rotary(3, 8, (1.0, 0.1, 0.01, 0.001), factor=0.9)
    x, positions = _random(6, 24), torch.arange(6)
    fused = rotary.with_norm(norm)
    assert torch.equal(fused(x, positions), rotary(norm(x), positions))
    assert dict(rotary.attributes())["eps"] == 0.0
    assert dict(fused.attributes()) == {**dict(rotary.attributes()), "eps": 1e-5}


def test_attention_is_causal_softmax() -> None:
    attention = Attention(6, 2, 5, 3, 0.4)
    q, k, v = _random(7, 30), _random(7, 10, seed=2), _random(7, 6, seed=3)
    result = attention(q, k, v)
    for token in range(7):
        for head in range(6):
            mine, shared = slice(5 * head, 5 * head + 5), head // 3
            keys = k[: token + 1, 5 * shared : 5 * shared + 5].double()
            weights = (keys @ q[token, mine].double() * 0.4).softmax(-1)
            expected = weights @ v[: token + 1, 3 * shared : 3 * shared + 3].double()
            _close(result[token, 3 * head : 3 * head + 3], expected)


@pytest.mark.parametrize(
    ("options", "given"),
    [
        (Options(window=3), {"window": 3}),
        (Options(chunk=4), {"chunk": 4}),
        (Options(softcap=0.7), {"softcap": 0.7}),
        (Options(sinks=np.linspace(-2, 3, 6)), {"sinks": "sinks"}),
        (
            Options(growth=0.3, growth_every=2, growth_from=1),
            {"growth": Growth(0.3, 2, 1)},
        ),
    ],
    ids=str,
)
def test_attention_may_be_asked_more(options: Options, given: dict[str, Any]) -> None:
    attention = Attention(6, 2, 5, 3, 0.4, **given)
    if options.sinks is not None:
        attention.get_parameter("sinks").copy_(torch.from_numpy(options.sinks))
        assert attention.weights("a.self_attn.attention")[0].name == "a.self_attn.sinks"
    q, k, v = _random(7, 30), _random(7, 10, seed=2), _random(7, 6, seed=3)
    pages = (part.numpy().reshape(7, 2, -1).swapaxes(0, 1)[None] for part in (k, v))
    where = np.zeros(1, np.int32), 0, 0.4
    expected = attention_prefill(q.numpy().reshape(7, 6, 5), *pages, *where, options)
    _close(attention(q, k, v), torch.from_numpy(expected).flatten(1))
    about = {f.name: getattr(options, f.name) for f in fields(options) if f.name != "sinks"}
    told = dict(attention.attributes())
    assert {name: told.get(name, 0) for name in about} == about
    assert OPS["attention"].possible(told)


def test_latent_attention_with_queries_that_grow() -> None:
    plain, growing = MLA(3, 5, 4, 6, 7, 0.3), MLA(3, 5, 4, 6, 7, 0.3, growth=Growth(0.3, 2))
    for each in (plain, growing):
        _filled(each)
    q, latent, k_rope = _random(5, 27), _random(5, 7, seed=2), _random(5, 4, seed=3)
    factor = torch.tensor([1 + 0.3 * math.log(1 + p // 2) for p in range(5)])[:, None]
    _close(growing(q, latent, k_rope), plain(q * factor, latent, k_rope).double())
    assert dict(growing.attributes())["growth_every"] == 2


def test_mla_absorbed_is_mla() -> None:
    heads, nope, rope, v_dim, rank = 3, 5, 4, 6, 7
    mla = MLA(heads, nope, rope, v_dim, rank, 0.3)
    _filled(mla)
    q, latent, k_rope = _random(5, 27), _random(5, rank, seed=2), _random(5, rope, seed=3)
    split = mla.kv_b.double().view(heads, nope + v_dim, rank)
    queries = q.double().view(5, heads, nope + rope)
    absorbed = torch.einsum("thn,hnr->thr", queries[..., :nope], split[:, :nope])
    scores = torch.einsum("thr,sr->hts", absorbed, latent.double())
    scores = (scores + torch.einsum("thd,sd->hts", queries[..., nope:], k_rope.double())) * 0.3
    scores = scores.masked_fill(torch.ones(5, 5).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hts,sr->thr", scores.softmax(-1), latent.double())
    expected = torch.einsum("thr,hvr->thv", mixed, split[:, nope:]).flatten(1)
    _close(mla(q, latent, k_rope), expected)


def test_route_gives_ties_to_the_lower_id() -> None:
    route = Route(6, 3, Scoring.SOFTMAX_ALL, normalise=True)
    ids, weights = route(torch.tensor([[0.0, 2.0, 1.0, 2.0, 1.0, 2.0]]))
    assert ids.tolist() == [[1, 3, 5]]
    assert ids.dtype == torch.int32
    torch.testing.assert_close(weights, torch.full((1, 3), 1 / 3))


def test_route_softmax_forms_agree_when_normalised() -> None:
    logits = _random(9, 11)
    every = Route(11, 4, Scoring.SOFTMAX_ALL, normalise=True)(logits)
    chosen = Route(11, 4, Scoring.SOFTMAX_CHOSEN, normalise=False)(logits)
    assert torch.equal(every[0], chosen[0])
    torch.testing.assert_close(every[1], chosen[1])


def test_route_chooses_within_the_best_groups_by_biased_scores() -> None:
    route = Route(
        8,
        2,
        Scoring.SIGMOID,
        normalise=True,
        groups=4,
        top_groups=2,
        factor=2.5,
        bias_name="gate.bias",
    )
    assert route.bias is not None
    route.bias.copy_(torch.tensor([0.0, 0, 0, 0, 0, 0, 0.6, 0.6]))
    logits = torch.tensor([[3.0, -9, 1, 1, 2, 0.5, -1, -1]])  # 0 is best, alone in a weak group
    ids, weights = route(logits)
    scores = logits.sigmoid()[0]
    assert ids.tolist() == [[4, 6]]  # groups 2 and 3; in them by biased score
    expected = scores[[4, 6]] / scores[[4, 6]].sum() * 2.5  # the bias weighs nothing
    torch.testing.assert_close(weights[0], expected)
    assert route.weights("model.layers.3.mlp.route")[0].name == "model.layers.3.mlp.gate.bias"


def test_experts_are_a_weighted_sum() -> None:
    experts = Experts(5, 6, 4, 2)
    _filled(experts)
    x = _random(3, 6)
    ids = torch.tensor([[4, 0], [0, 1], [4, 1]], dtype=torch.int32)
    weights = _random(3, 2, seed=4)
    result = experts(x, (ids, weights))
    for token in range(3):
        expected = torch.zeros(6, dtype=torch.float64)
        for slot in range(2):
            e, row = int(ids[token, slot]), x[token].double()
            gate, up = experts.gate[e].double() @ row, experts.up[e].double() @ row
            hidden = gate / (1 + (-gate).exp()) * up
            expected += weights[token, slot].double() * (experts.down[e].double() @ hidden)
        _close(result[token], expected)


def test_fused_forms_equal_their_parts() -> None:
    gate, up, norm = Linear(6, 4), Linear(6, 4), RMSNorm(6, 1e-6)
    for seed, block in enumerate((gate, up, norm)):
        _filled(block, seed)
    x, d0, d1 = _random(3, 6), _random(3, 6, seed=2), _random(3, 6, seed=3)
    assert torch.equal(GateUp(gate, up)(x), functional.silu(gate(x)) * up(x))
    assert torch.equal(GateUp(gate, up, "gelu(up) + gate")(x), functional.gelu(up(x)) + gate(x))
    total, normed = AddNorm(norm)(x, d0)
    assert torch.equal(total, x + d0)
    assert torch.equal(normed, norm(x + d0))
    assert torch.equal(AddNorm(norm)(x, d0, d1)[0], x + (d0 + d1))


def test_gate_up_refuses_a_bias() -> None:
    with pytest.raises(ValueError, match="bias"):
        GateUp(Linear(6, 4, bias=True), Linear(6, 4))


def test_columns() -> None:
    x = _random(2, 9)
    assert torch.equal(Columns(1, 4, 3)(x), x[:, 4:7])
