"""Sparse latent attention: the indexer's choice of positions, and attention to it."""

from __future__ import annotations

import torch
from torch import Tensor

from hmc.blocks.attention import MLA
from hmc.blocks.base import Block, parameter, sibling
from hmc.graph import Attr, WeightSpec, attrs


class Index(Block):
    """The positions that each token attends to: of those up to its own the `index_topk` with the
    best scores, sum over heads h of weights_h relu(q_h . k), of equal ones the lower.

    q [T, heads * dim] and k [T, dim], rotated, weights [T, heads] -> i32 [T, index_topk],
    ascending, -1 behind the last.
    """

    kind = "index"
    dtype = "i32"

    def __init__(self, heads: int, dim: int, index_topk: int) -> None:
        super().__init__()
        self.heads, self.dim, self.index_topk = heads, dim, index_topk
        self.width = index_topk

    def forward(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        place = torch.arange(len(q))
        scores = index_scores(q.reshape(len(q), self.heads, self.dim), k, weights)
        scores = scores.masked_fill(place > place[:, None], float("-inf"))
        return best(scores, place + 1, self.index_topk)


class SparseMLA(MLA):
    """Latent attention of each token to the positions of a row of `chosen` [T, index_topk]. `sinks`
    is what the checkpoint calls a vector [heads] beside the block: one more score a head, whose
    value is 0. What was chosen are pools of so many positions as `pool` says, if any; without a
    rotated part (`rope` 0) there is no k_rope. Latents are those that the earlier layer `source`
    keeps where it is said.
    """

    kind = "sparse_mla"

    def __init__(
        self,
        heads: int,
        nope: int,
        rope: int,
        v_dim: int,
        rank: int,
        scale: float,
        index_topk: int,
        *,
        sinks: str | None = None,
        pool: int = 0,
        source: int | None = None,
    ) -> None:
        super().__init__(heads, nope, rope, v_dim, rank, scale)
        self.pool, self.source = pool, source
        self.index_topk, self.sinks_name = index_topk, sinks
        self.sinks = parameter(heads) if sinks else None

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        found = super().weights(path)
        if self.sinks_name is None:
            return found
        return (*found, WeightSpec("sinks", sibling(path, self.sinks_name), (self.heads,)))

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        given = {"pool": self.pool} if self.pool else {}
        if self.source is not None:
            given["source"] = self.source
        return attrs(**dict(super().attributes()), **given)

    def forward(self, q: Tensor, latent: Tensor, *more: Tensor) -> Tensor:
        *rotated, chosen = more
        k_rope = rotated[0] if rotated else latent[:, :0]
        hidden = torch.ones(len(q), len(q) + 1, dtype=torch.bool)
        hidden.scatter_(1, chosen.long() % (len(q) + 1), False)  # -1: the column behind the last
        return self.attend(q, latent, k_rope, hidden[:, :-1], self.sinks)


def index_scores(q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
    """Scores [..., T, S] of queries [..., T, heads, dim] and their heads' weights [..., T, heads],
    for keys [..., S, dim]."""
    products = torch.relu(q.transpose(-3, -2) @ k[..., None, :, :].transpose(-1, -2))
    return (products * weights.transpose(-1, -2)[..., None]).sum(-3)


def best(scores: Tensor, seen: Tensor, most: int) -> Tensor:
    """Of rows [T, S] of scores, -inf where a token sees nothing, the `most` places with the best
    ones: i32 [T, most], ascending, then -1; `seen` [T] are how many a token sees.
    """
    order = scores.sort(dim=-1, descending=True, stable=True).indices[:, :most]
    number = torch.arange(order.shape[1], device=scores.device)
    order = order.masked_fill(number >= seen[:, None], scores.shape[1]).sort(-1).values
    found = order.new_full((len(scores), most), -1, dtype=torch.int32)
    found[:, : order.shape[1]] = order.masked_fill(order == scores.shape[1], -1)
    return found
