"""A paged cache of random rows, and attention over it in float64."""

from __future__ import annotations

from dataclasses import dataclass

import torch


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Paged:
    """Sequences of `lengths` tokens whose blocks lie in any order, each with `blocks`."""

    lengths: torch.Tensor
    tables: torch.Tensor
    block: int

    @staticmethod
    def of(lengths: list[int], blocks: int, block: int) -> Paged:
        seeded = torch.Generator().manual_seed(len(lengths))
        tables = torch.randperm(len(lengths) * blocks, generator=seeded).view(-1, blocks)
        return Paged(torch.tensor(lengths), tables.to(torch.int32), block)

    def state(self, width: int, seed: int) -> torch.Tensor:
        """Rows bf16 [cache rows, width], NaN where nobody has written."""
        found = torch.full((self.tables.numel() * self.block, width), float("nan"))
        for i in range(len(self.lengths)):
            rows = self.rows(i)
            found[rows] = random(len(rows), width, seed=100 * seed + i)
        return found.to(torch.bfloat16)

    def rows(self, i: int) -> torch.Tensor:
        """Cache rows of a sequence."""
        place = torch.arange(int(self.lengths[i]))
        return self.tables[i][place // self.block].long() * self.block + place % self.block


def attended(
    q: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    scale: float,
    softcap: float = 0.0,
    sinks: torch.Tensor | None = None,
    hidden: torch.Tensor | None = None,
) -> torch.Tensor:
    """f64 [T, heads * v] of q [T, heads, d] over keys [S, kv_heads, d] and values [S, kv_heads, v];
    q is rounded to bf16; `hidden` [T, S]."""
    group = q.shape[1] // keys.shape[1]
    wide = q.to(torch.bfloat16).double()
    keys, values = (each.double().repeat_interleave(group, 1) for each in (keys, values))
    scores = torch.einsum("thd,shd->hts", wide, keys) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if hidden is not None:
        scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        sink = sinks.double()[:, None, None].expand(-1, len(q), 1)
        scores = torch.cat((scores, sink), 2)
        values = torch.cat((values, torch.zeros_like(values[:1])))
    return torch.einsum("hts,shd->thd", scores.softmax(-1), values).flatten(1)
