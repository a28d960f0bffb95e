"""Latent attention of one query a sequence in Triton's interpreter, against float64."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from format_rows import BLOCKS, FOUR_BITS
from interpreted import error
from triton_paged import Paged, attended, random
from triton_weights import random_weight

from hmc.formats import Format, format_of, registered
from hmc.runtime.device_ops.triton.attention import latent, over_latents
from hmc.runtime.device_ops.triton.launch import Workspace

ROUNDED = 6e-3
"""Relative error of results in bf16, of queries, latents and sums in bf16."""


@pytest.mark.few(5)
@pytest.mark.parametrize(
    "row",
    [*map(format_of, ("fp8", "bf16", "f32", "int4-zero")), BLOCKS, FOUR_BITS,
     pytest.param(format_of("nvfp4"), marks=pytest.mark.slow)],
    ids=lambda row: row.name,
)  # fmt: skip
@pytest.mark.parametrize(
    ("heads", "nope", "rope", "v_dim", "rank"), [(3, 40, 8, 24, 64), (2, 128, 16, 128, 160)]
)
def test_kv_b_multiplies_query_and_result(
    row: Format, heads: int, nope: int, rope: int, v_dim: int, rank: int, work: Workspace
) -> None:
    with registered(row):
        kv_b, values = random_weight(row, heads * (nope + v_dim), rank)
    into, out = values.view(heads, nope + v_dim, rank).split((nope, v_dim), 1)
    paged = Paged.of([37, 1], 3, 16)
    cache = paged.state(rank + rope, 1)
    q, size = random(2, heads * (nope + rope)), float(values.std()) * nope**0.5
    q.view(2, heads, -1)[..., nope:] *= size  # what is turned counts as much
    scale = 1 / (size * (rank + rope) ** 0.5)
    y = torch.full((2, heads * v_dim), float("nan"), dtype=torch.bfloat16)
    attends = partial(over_latents, cache=cache, tables=paged.tables, lengths=paged.lengths,
                      work=work, rank=rank, scale=scale, block=16)  # fmt: skip
    latent(q, kv_b, y, attends, heads=heads, nope=nope, rope=rope, v_dim=v_dim)
    queries = q.double().view(2, heads, nope + rope)
    wide = torch.einsum("thn,hnr->thr", queries[..., :nope], into)
    wide = torch.cat((wide, queries[..., nope:]), -1)
    exact = torch.empty(2, heads, v_dim, dtype=torch.float64)
    for i in range(2):
        seen = cache[paged.rows(i)][:, None]
        mixed = attended(wide[i : i + 1], seen, seen[..., :rank], scale)
        exact[i] = torch.einsum("hr,hvr->hv", mixed.view(heads, rank), out)
    assert error(y, exact.flatten(1)) < ROUNDED
