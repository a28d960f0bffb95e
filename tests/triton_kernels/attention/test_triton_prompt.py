"""Attention of a prompt in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import error
from triton_paged import attended, random

from hmc.runtime.device_ops.triton.attention import prompt
from hmc.runtime.device_ops.triton.launch import Workspace

ROUNDED = 3e-3


@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "v_dim", "tokens", "past", "window", "softcap", "sinks"),
    [
        (2, 3, 40, 40, 133, 0, 0, 0.0, False),
        (2, 1, 192, 128, 70, 161, 0, 0.0, True),
        (1, 2, 64, 64, 1, 200, 0, 3.0, False),
        (1, 2, 80, 80, 140, 90, 50, 0.0, True),
        (1, 1, 256, 256, 67, 70, 1, 10.0, False),
    ],
)
def test_queries_see_no_later_keys(
    kv_heads: int,
    group: int,
    head_dim: int,
    v_dim: int,
    tokens: int,
    past: int,
    window: int,
    softcap: float,
    sinks: bool,
    work: Workspace,
) -> None:
    heads, total, scale = kv_heads * group, past + tokens, head_dim**-0.5
    q = random(tokens, heads * head_dim + 3)[:, 3:] * 3.0
    keys, values = (
        random(total, kv_heads * dim, seed=dim).to(torch.bfloat16) for dim in (head_dim, v_dim + 1)
    )
    values = values[:, : kv_heads * v_dim]
    y = torch.full((tokens, heads * v_dim), float("nan"), dtype=torch.bfloat16)
    sink = random(heads, seed=3) if sinks else None
    prompt(
        q, keys, values, y, kv_heads=kv_heads, head_dim=head_dim, v_dim=v_dim, scale=scale,
        window=window, softcap=softcap, sinks=sink,
    )  # fmt: skip
    query, key = torch.arange(past, total)[:, None], torch.arange(total)[None]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    parts = (each.reshape(total, kv_heads, -1) for each in (keys, values))
    exact = attended(q.reshape(tokens, heads, -1), *parts, scale, softcap, sink, hidden)
    assert error(y, exact) < ROUNDED
