"""An indexer that chooses pools of positions, as a node, and the functions that its reference is
made of; devices compute by them too (runtime/device_ops/pools.py).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.compressed import pooled, seen_rows
from hmc.blocks.sparse import best, index_scores
from hmc.graph import WeightSpec
from hmc.ops.pools import pooled_positions


class IndexPools(Block):
    """The positions that each token attends to: those of the `index_topk` / `pool` pools that have
    ended with the best scores, sum over heads h of weights_h relu(q_h . k), of equal ones the
    lower, and all of the pool that its own is in, where that is open.

    q [T, heads * dim], k [T, dim] and gate [T, dim], by which a pool's key is a mean of its
    positions', weights [T, heads] -> i32 [T, index_topk + pool - 1], ascending, -1 behind the last.
    `ape` is what the checkpoint calls a matrix [pool, dim] beside the block that is added to the
    gates of a pool.
    """

    kind = "index_pools"
    dtype = "i32"

    def __init__(self, heads: int, dim: int, index_topk: int, pool: int, ape: str) -> None:
        super().__init__()
        self.heads, self.dim, self.index_topk, self.pool = heads, dim, index_topk, pool
        self.width = pooled_positions(index_topk, pool)
        self.ape_name, self.ape = ape, parameter(pool, dim)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return (WeightSpec("ape", sibling(path, self.ape_name), (self.pool, self.dim)),)

    def forward(self, q: Tensor, k: Tensor, gate: Tensor, weights: Tensor) -> Tensor:
        place, start = torch.arange(len(q)), torch.zeros(3, self.dim)
        keys, _ = pooled(of_pools(self.pool), start, k, gate, self.ape, 0)
        queries = q.reshape(len(q), self.heads, self.dim)
        return chosen(queries, keys, weights, place, self.index_topk, self.pool)


def of_pools(pool: int) -> dict[str, Any]:
    """Attributes by which `pooled` makes keys of pools."""
    return {"ratio": pool, "overlap": 0}


def chosen(
    q: Tensor, keys: Tensor, weights: Tensor, positions: Tensor, most: int, pool: int
) -> Tensor:
    """Positions i32 [T, most + pool - 1] of queries [T, heads, dim] at `positions` [T], of the keys
    [P, dim] of pools.
    """
    scores = index_scores(q, keys, weights)
    scores = scores.masked_fill(~seen_rows(positions, len(keys), pool), float("-inf"))
    ended = (positions + 1) // pool
    pools = best(scores, ended, most // pool).long()
    each = torch.arange(pool, device=q.device)
    within = (pools[..., None] * pool + each).masked_fill(pools[..., None] < 0, -1).flatten(-2)
    found = within.new_full((len(q), pooled_positions(most, pool)), -1)
    found[:, :most] = within
    tail = each[: pool - 1]
    left = (tail < ((positions + 1) % pool)[:, None]).long()
    behind = (ended.clamp(max=most // pool) * pool)[:, None] + tail
    found.scatter_(1, behind, ((ended * pool)[:, None] + tail) * left - (1 - left))
    return found.to(torch.int32)
