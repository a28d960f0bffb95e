"""Block-sparse attention: the indexer's choice of blocks, and attention to their positions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from hmc.blocks.base import Block

_LEAST = torch.finfo(torch.float32).min


class IndexBlocks(Block):
    """The blocks of `index_block` positions that each token attends to, for each index head: the
    last `index_local` ones up to its own, then those with the largest q . k of a position that it
    sees, `index_topk` in all, of equal ones the lower.

    q [T, heads * dim] and k [T, dim], rotated -> i32 [T, heads * index_topk], ascending for each
    head, -1 behind the last.
    """

    kind = "index_blocks"
    dtype = "i32"

    def __init__(self, heads: int, dim: int, index_block: int, index_topk: int, local: int) -> None:
        super().__init__()
        self.heads, self.dim = heads, dim
        self.index_block, self.index_topk, self.index_local = index_block, index_topk, local
        self.width = heads * index_topk

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        scores = q.reshape(len(q), self.heads, self.dim) @ k.T
        positions = torch.arange(len(q))
        return chosen_blocks(
            scores, positions, self.index_block, self.index_topk, self.index_local
        ).flatten(1)


class SparseAttention(Block):
    """`Attention` of each token to the positions up to its own in the blocks of its row of `chosen`
    [T, index_heads * index_topk]; key heads h n, ..., (h + 1) n - 1 read what index head h chose.
    """

    kind = "sparse_attention"
    dtype = "bf16"

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int,
        scale: float,
        *,
        index_heads: int,
        index_block: int,
        index_topk: int,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.v_dim, self.scale, self.index_heads = v_dim, scale, index_heads
        self.index_block, self.index_topk = index_block, index_topk
        self.width = heads * v_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        tokens = len(q)
        blocks = -(-tokens // self.index_block)
        seen = torch.zeros(tokens, self.index_heads, blocks + 1, dtype=torch.bool)
        numbers = chosen.long().reshape(tokens, self.index_heads, -1)
        seen.scatter_(2, numbers % (blocks + 1), True)  # -1: the column behind the last
        seen = seen[..., :-1].repeat_interleave(self.index_block, 2)[..., :tokens]
        seen = seen.repeat_interleave(self.heads // self.index_heads, 1).transpose(0, 1)
        place = torch.arange(tokens)
        group = self.heads // self.kv_heads
        keys = k.reshape(tokens, self.kv_heads, -1).repeat_interleave(group, 1)
        values = v.reshape(tokens, self.kv_heads, -1).repeat_interleave(group, 1)
        queries = q.reshape(tokens, self.heads, -1)
        scores = torch.einsum("thd,shd->hts", queries, keys) * self.scale
        scores = scores.masked_fill(~seen | (place > place[:, None]), float("-inf"))
        return torch.einsum("hts,shd->thd", scores.softmax(-1), values).flatten(-2)


def chosen_blocks(scores: Tensor, positions: Tensor, size: int, most: int, local: int) -> Tensor:
    """Of scores [T, heads, S] of the positions 0, ..., S - 1, S beyond all of `positions` [T]: the
    `most` best blocks of `size`, i32 [T, heads, most], ascending, then -1. What a token at one of
    the `positions` does not see counts for nothing.
    """
    tokens, heads, length = scores.shape
    place = torch.arange(length, device=scores.device)
    scores = torch.nan_to_num(scores, nan=_LEAST, neginf=_LEAST)
    scores = scores.masked_fill(place > positions[:, None, None], float("-inf"))
    blocks = -(-length // size)
    scores = pad(scores, (0, blocks * size - length), value=float("-inf"))
    best = scores.view(tokens, heads, blocks, size).amax(-1)
    own = (positions // size)[:, None, None]
    number = torch.arange(blocks, device=scores.device)
    best = best.masked_fill((number <= own) & (number > own - local), float("inf"))
    order = best.sort(dim=-1, descending=True, stable=True).indices[..., :most]
    order = order.masked_fill(order > own, blocks).sort(-1).values
    order = order.masked_fill(order == blocks, -1).to(torch.int32)
    return pad(order, (0, most - order.shape[-1]), value=-1)
