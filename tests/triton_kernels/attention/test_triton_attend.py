"""Attention of one query a sequence in Triton's interpreter, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from interpreted import error
from triton_paged import Paged, attended, random

from hmc.codegen.triton import attend_tiles
from hmc.codegen.triton.attend_tiles import Head
from hmc.ops.attention import NO_BOUNDS, Bounds, Growth
from hmc.runtime.device_ops.context import grown
from hmc.runtime.device_ops.triton.attention import attend
from hmc.runtime.device_ops.triton.launch import Workspace

ROUNDED = 3e-3
"""Relative error of results in bf16."""


@pytest.mark.few(3)
@pytest.mark.parametrize(
    ("kv_heads", "group", "head_dim", "v_dim", "bounds", "softcap", "sinks", "growth"),
    [
        (2, 3, 40, 40, NO_BOUNDS, 0.0, False, None),
        (1, 17, 80, 80, NO_BOUNDS, 5.0, False, None),
        (2, 4, 192, 128, NO_BOUNDS, 0.0, True, (0.3, 50, 1)),
        (1, 1, 256, 256, Bounds(window=33), 0.0, False, (0.1, 64, 0)),
        (2, 8, 64, 64, Bounds(window=200), 20.0, True, None),
        (2, 5, 112, 96, Bounds(chunk=70), 0.0, True, None),
        (1, 12, 512, 512, Bounds(chunk=100), 0.0, False, None),
    ],
)
def test_heads_of_any_size(
    kv_heads: int,
    group: int,
    head_dim: int,
    v_dim: int,
    bounds: Bounds,
    softcap: float,
    sinks: bool,
    growth: Growth,
    work: Workspace,
) -> None:
    heads, scale = kv_heads * group, head_dim**-0.5
    paged = Paged.of([1, 333, 70], 33, 16)
    keys, values = paged.state(kv_heads * head_dim, 1), paged.state(kv_heads * v_dim, 2)
    q = random(3, heads * head_dim + 5)[:, 5:] * 3.0  # some columns of a buffer
    y = torch.full((3, heads * v_dim), float("nan"), dtype=torch.bfloat16)
    sink = random(heads, seed=3) if sinks else None
    attend(
        q, keys, values, paged.tables, paged.lengths, y, work, kv_heads=kv_heads,
        head_dim=head_dim, v_dim=v_dim, scale=scale, block=16, bounds=bounds, softcap=softcap,
        sinks=sink, growth=growth,
    )  # fmt: skip
    assert not work.counters.any()
    for i in range(3):
        last = int(paged.lengths[i]) - 1
        rows = paged.rows(i)[max(0, bounds.first(last)) :]
        mine = grown(q[i : i + 1], torch.tensor([last]), growth).view(1, heads, head_dim)
        parts = (each[rows].view(len(rows), kv_heads, -1) for each in (keys, values))
        assert error(y[i], attended(mine, *parts, scale, softcap, sink)) < ROUNDED


def over(paged: Paged, q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor,
         work: Workspace) -> torch.Tensor:  # fmt: skip
    """Of four heads of 64, two a key head; tables are of rows."""
    y = torch.full((len(q), 4 * 64), float("nan"), dtype=torch.bfloat16)
    attend(q, keys, values, paged.tables.long(), paged.lengths, y, work, kv_heads=2, head_dim=64,
           v_dim=64, scale=0.125)  # fmt: skip
    assert not work.counters.any()
    return y


def test_parts_are_joined_in_one_order(work: Workspace, backwards: Callable[[], None]) -> None:
    paged, q = Paged.of([700], 704, 1), random(1, 4 * 64)
    keys, values = paged.state(2 * 64, 1), paged.state(2 * 64, 2)
    found = over(paged, q, keys, values, work)
    backwards()
    assert torch.equal(over(paged, q, keys, values, work), found)


def test_a_launch_is_right_for_any_lengths_its_tables_hold(work: Workspace) -> None:
    q = random(2, 4 * 64)
    for lengths in ([700, 701], [1, 0], [128, 129]):
        paged = Paged.of(lengths, 704, 1)
        keys, values = paged.state(2 * 64, 1), paged.state(2 * 64, 2)
        y = over(paged, q, keys, values, work)
        for i, length in enumerate(lengths):
            rows = paged.rows(i)
            seen = (each[rows].view(length, 2, 64) for each in (keys, values))
            exact = attended(q[i].view(1, 4, 64), *seen, 0.125)
            assert error(y[i], exact) < ROUNDED if length else not y[i].any()


def test_latents_are_keys_and_values(work: Workspace) -> None:
    heads, rank, rope = 35, 40, 8
    paged = Paged.of([300, 5], 32, 16)
    cache = paged.state(rank + rope, 1)
    q, y = random(2, heads * (rank + rope)), torch.empty(2, heads * rank, dtype=torch.bfloat16)
    attend(q, cache, None, paged.tables, paged.lengths, y, work, kv_heads=1, head_dim=rank + rope,
           v_dim=rank, scale=0.2, block=16)  # fmt: skip
    for i in range(2):
        seen = cache[paged.rows(i)][:, None]
        exact = attended(q[i].view(1, heads, -1), seen, seen[..., :rank], 0.2)
        assert error(y[i], exact) < ROUNDED


def test_pieces_of_a_head() -> None:
    sizes = {dim: Head(dim, dim) for dim in (40, 64, 80, 96, 112, 192, 256)}
    found = {dim: (head.cut, head.main, head.rest) for dim, head in sizes.items()}
    assert found == {
        40: (32, 32, 16),
        64: (64, 64, 16),
        80: (64, 64, 16),
        96: (64, 64, 32),
        112: (112, 128, 16),
        192: (128, 128, 64),
        256: (256, 256, 16),
    }
    latent = Head(576, 512, shared=True)
    assert (latent.cut, latent.main, latent.rest, latent.wide) == (512, 512, 64, 512)


def test_splits_fill_a_gpu_and_keep_to_their_room() -> None:
    assert attend_tiles.splits(8, 1 << 15, 170, 16 * 130, 1 << 21) == 43
    assert attend_tiles.splits(1, 1 << 15, 170, 16 * 130, 1 << 21) == 64
    assert attend_tiles.splits(8, 300, 170, 16 * 130, 1 << 21) == 2
    assert attend_tiles.splits(8, 1 << 15, 170, 16 * 514, 1 << 21) == 31
    assert attend_tiles.splits(1000, 1 << 15, 170, 16 * 130, 1 << 21) == 1
