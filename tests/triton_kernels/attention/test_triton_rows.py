"""Norms, sums, rotary embedding and rows of caches in Triton's interpreter, against float64."""

from __future__ import annotations

import pytest
import torch
from interpreted import error
from triton_paged import random

from hmc.runtime.device_ops.triton.attention import append
from hmc.runtime.device_ops.triton.launch import Workspace
from hmc.runtime.device_ops.triton.rows import add_norm, norm, rotary

EPS = 1e-5
BOUND, ROUNDED = 3e-7, 3e-3
"""Relative errors of results in f32 and in bf16."""


def normed(x: torch.Tensor, gamma: torch.Tensor) -> torch.Tensor:
    wide = x.double()
    return wide / (wide.square().mean(-1, keepdim=True) + EPS).sqrt() * gamma.double()


@pytest.mark.parametrize(("tokens", "groups", "width"), [(3, 1, 1000), (5, 7, 40), (1, 1, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norm_of_chunks(
    tokens: int, groups: int, width: int, dtype: torch.dtype, work: Workspace
) -> None:
    x = random(tokens, groups * width + 3)[:, 3:].to(dtype)
    gamma = random(width, seed=1).to(torch.bfloat16)
    y = torch.full((tokens, groups * width), float("nan"), dtype=dtype)
    norm(x, gamma, y, groups=groups, eps=EPS)
    exact = normed(x.reshape(tokens, groups, width), gamma).flatten(1)
    assert error(y, exact) < (BOUND if dtype == torch.float32 else ROUNDED)


@pytest.mark.parametrize("more", [False, True])
def test_the_sum_and_its_norm(more: bool, work: Workspace) -> None:
    h, d0, d1 = (random(3, 777, seed=seed) for seed in range(3))
    gamma, y = random(777, seed=3), torch.empty(3, 777, dtype=torch.bfloat16)
    total = h + (d0 + d1) if more else h + d0
    add_norm(h, d0, d1 if more else None, h, gamma, y, eps=EPS)  # the sum takes a term's place
    assert torch.equal(h, total)
    assert error(y, normed(total, gamma)) < ROUNDED
    out = torch.empty_like(h)
    add_norm(h, d0, None, out)
    assert torch.equal(out, h + d0)


def turned(x: torch.Tensor, angle: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """x [T, heads, dim] by angles f64 [T, dim / 2]."""
    a, b = (x[..., 0::2], x[..., 1::2]) if interleaved else x.chunk(2, -1)
    cos, sin = angle.cos()[:, None], angle.sin()[:, None]
    pair = a * cos - b * sin, b * cos + a * sin
    return torch.stack(pair, -1).flatten(-2) if interleaved else torch.cat(pair, -1)


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("with_norm", [False, True])
@pytest.mark.parametrize(
    ("heads", "head_dim", "start", "dim"), [(3, 24, 10, 12), (40, 64, 0, 64), (1, 5, 1, 2)]
)
def test_a_slice_of_every_head_is_turned(
    heads: int,
    head_dim: int,
    start: int,
    dim: int,
    interleaved: bool,
    with_norm: bool,
    work: Workspace,
) -> None:
    x = random(3, heads * head_dim + 4)
    place = x[:, 4:]  # some columns of a buffer
    exact = place.double().view(3, heads, head_dim)
    gamma = random(head_dim, seed=1) if with_norm else None
    if gamma is not None:
        exact = normed(exact, gamma)
    positions = torch.tensor([0, 7, 100_003])
    inverse = 10_000.0 ** -(torch.arange(dim // 2) * 2 / dim)
    angle = (positions.float()[:, None] * inverse).double()  # as f32 has it
    exact = exact.clone()
    part = slice(start, start + dim)
    exact[..., part] = turned(exact[..., part], angle, interleaved) * 1.25
    before = x[:, :4].clone()
    rotary(
        place, positions, inverse, gamma, heads=heads, head_dim=head_dim, start=start, dim=dim,
        interleaved=interleaved, factor=1.25, eps=EPS,
    )  # fmt: skip
    assert error(place, exact.flatten(1)) < BOUND
    assert torch.equal(x[:, :4], before)


def test_new_rows_of_all_states_of_a_layer(work: Workspace) -> None:
    slots = torch.tensor([9, 0, 4])
    k, v = random(3, 1100), random(3, 40, seed=1).to(torch.bfloat16)
    keys, values = (torch.zeros(12, width, dtype=torch.bfloat16) for width in (1100, 40))
    append((k, v), (keys, values), slots)
    cache = torch.zeros(12, 1140, dtype=torch.bfloat16)
    append((k, v), (cache[:, :1100], cache[:, 1100:]), slots)  # side by side
    for found in (torch.cat((keys, values), 1), cache):
        wanted = torch.zeros_like(cache)
        wanted[slots] = torch.cat((k.to(torch.bfloat16), v), 1)
        assert torch.equal(found, wanted)
