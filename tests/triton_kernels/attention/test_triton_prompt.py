"""Attention of a prompt in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import error
from triton_paged import attended, random

from hmc.ops.attention import NO_BOUNDS, Bounds, Growth
from hmc.runtime.device_ops.context import grown
from hmc.runtime.device_ops.triton.attention import prompt
from hmc.runtime.device_ops.triton.launch import Workspace

ROUNDED = 3e-3


@pytest.mark.few(5)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "v_dim", "tokens", "past", "bounds", "softcap", "sinks"),
    [
        (2, 3, 40, 40, 133, 0, NO_BOUNDS, 0.0, False),
        (2, 1, 192, 128, 70, 161, NO_BOUNDS, 0.0, True),
        (1, 2, 64, 64, 1, 200, NO_BOUNDS, 3.0, False),
        (1, 2, 80, 80, 140, 90, Bounds(window=50), 0.0, True),
        (1, 1, 256, 256, 67, 70, Bounds(window=1), 10.0, False),
        (1, 5, 112, 96, 140, 90, Bounds(chunk=70), 0.0, True),
    ],
)
@pytest.mark.parametrize("growth", [None, (0.3, 50, 1)])
def test_queries_see_no_later_keys(
    kv_heads: int,
    group: int,
    head_dim: int,
    v_dim: int,
    tokens: int,
    past: int,
    bounds: Bounds,
    softcap: float,
    sinks: bool,
    growth: Growth,
    work: Workspace,
) -> None:
    heads, total, scale = kv_heads * group, past + tokens, head_dim**-0.5
    q = random(tokens, heads * head_dim + 3)[:, 3:] * 3.0
    keys, values = (
        random(total, kv_heads, dim, seed=dim).to(torch.bfloat16) for dim in (head_dim, v_dim + 1)
    )
    values = values[..., :v_dim]
    y = torch.full((tokens, heads * v_dim), float("nan"), dtype=torch.bfloat16)
    sink = random(heads, seed=3) if sinks else None
    low = max(0, bounds.first(past))  # keys before it need not be there
    prompt(
        q, keys[low:], values[low:], y, scale=scale, bounds=bounds, softcap=softcap, sinks=sink,
        growth=growth, before=low,
    )  # fmt: skip
    query, key = torch.arange(past, total)[:, None], torch.arange(total)[None]
    hidden = (key > query) | (key < bounds.first(query))
    wide = grown(q, query[:, 0], growth).reshape(tokens, heads, -1)
    assert error(y, attended(wide, keys, values, scale, softcap, sink, hidden)) < ROUNDED


@pytest.mark.parametrize(("nope", "rope", "v_dim"), [(128, 64, 128), (40, 8, 24)])
def test_keys_and_values_side_by_side_and_what_all_heads_turn(
    nope: int, rope: int, v_dim: int, work: Workspace
) -> None:
    heads, tokens, past, scale = 3, 70, 61, (nope + rope) ** -0.5
    q = random(tokens, heads * (nope + rope)) * 3.0
    both = random(past + tokens, heads, nope + v_dim, seed=1).to(torch.bfloat16)
    turned = random(past + tokens, rope + 2, seed=2).to(torch.bfloat16)[:, 2:]
    keys, values = both.split((nope, v_dim), 2)
    y = torch.full((tokens, heads * v_dim), float("nan"), dtype=torch.bfloat16)
    prompt(q, keys, values, y, turned=turned, scale=scale)
    whole = torch.cat((keys, turned[:, None].expand(-1, heads, -1)), 2)
    hidden = torch.arange(past + tokens)[None] > torch.arange(past, past + tokens)[:, None]
    exact = attended(q.view(tokens, heads, -1), whole, values, scale, hidden=hidden)
    assert error(y, exact) < ROUNDED
