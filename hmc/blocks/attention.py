"""Rotary embedding and the two attentions; the reference computes every score of the prompt at
once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.dense import RMSNorm
from hmc.graph import WeightSpec


class Rotary(Block):
    """Rotates elements [start, start + dim) of each of `heads` heads by position x `inv_freq` (dim
    / 2 floats).

    A pair is (i, i + dim / 2) of the slice, or (2i, 2i + 1) when `interleaved`; it stays where it
    is. `factor` scales cos and sin (YaRN's attention factor). `norm`, one gamma [head_dim] for all
    heads, is applied to each head first.
    """

    kind = "rotary"

    def __init__(
        self,
        heads: int,
        head_dim: int,
        inv_freq: tuple[float, ...],
        *,
        start: int = 0,
        interleaved: bool = False,
        factor: float = 1.0,
        norm: RMSNorm | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rope = heads, head_dim, inv_freq
        self.start, self.interleaved, self.factor = start, int(interleaved), factor
        self.dim = 2 * len(inv_freq)
        self.width = heads * head_dim
        self.norm, self.eps = norm, norm.eps if norm else 0.0

    def with_norm(self, norm: RMSNorm) -> Rotary:
        """The same rotation with a per-head norm before it: the fused form of the two nodes."""
        return Rotary(
            self.heads,
            self.head_dim,
            self.rope,
            start=self.start,
            interleaved=bool(self.interleaved),
            factor=self.factor,
            norm=norm,
        )

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        heads = x.reshape(len(x), self.heads, self.head_dim)
        part = heads[..., self.start : self.start + self.dim]
        inv_freq = torch.tensor(self.rope, dtype=torch.float32)
        angle = (positions.float()[:, None] * inv_freq)[:, None, :]  # [T, 1, dim / 2]
        cos, sin = angle.cos() * self.factor, angle.sin() * self.factor
        if self.interleaved:
            a, b = part[..., 0::2], part[..., 1::2]
            turned = torch.stack((a * cos - b * sin, b * cos + a * sin), -1).flatten(-2)
        else:
            a, b = part.chunk(2, -1)
            turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        before, after = heads[..., : self.start], heads[..., self.start + self.dim :]
        return torch.cat((before, turned, after), -1).flatten(-2)


class Attention(Block):
    """Causal grouped-query attention: q [T, heads * head_dim], k [T, kv_heads * head_dim], v [T,
    kv_heads * v_dim].

    Query head h reads key head h // (heads / kv_heads).
    """

    kind = "attention"
    dtype = "bf16"

    def __init__(self, heads: int, kv_heads: int, head_dim: int, v_dim: int, scale: float) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.v_dim, self.scale = v_dim, scale
        self.width = heads * v_dim

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = q.reshape(len(q), self.heads, self.head_dim)
        group = self.heads // self.kv_heads
        keys = k.reshape(len(k), self.kv_heads, self.head_dim).repeat_interleave(group, 1)
        values = v.reshape(len(v), self.kv_heads, self.v_dim).repeat_interleave(group, 1)
        return _attend(queries, keys, values, self.scale)


class MLA(Block):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a compressed
    cache.

    q [T, heads * (nope + rope)], its rope part rotated; latent [T, rank], normed; k_rope [T, rope],
    rotated, shared by all heads. `kv_b` [heads * (nope + v_dim), rank] expands a latent to each
    head's key and value; a kernel absorbs it into the query and the result instead. Its checkpoint
    name is `kv_b_proj.weight` beside the block.
    """

    kind = "mla"
    dtype = "bf16"

    def __init__(
        self, heads: int, nope: int, rope: int, v_dim: int, rank: int, scale: float
    ) -> None:
        super().__init__()
        self.heads, self.nope, self.rope, self.v_dim = heads, nope, rope, v_dim
        self.rank, self.scale = rank, scale
        self.width = heads * v_dim
        self.kv_b = parameter(heads * (nope + v_dim), rank)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        shape = (self.heads * (self.nope + self.v_dim), self.rank)
        return (WeightSpec("kv_b", sibling(path, "kv_b_proj.weight"), shape, linear=True),)

    def forward(self, q: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        queries = q.reshape(len(q), self.heads, self.nope + self.rope)
        expanded = (latent @ self.kv_b.T).reshape(len(q), self.heads, self.nope + self.v_dim)
        shared = k_rope[:, None, :].expand(-1, self.heads, -1)
        keys = torch.cat((expanded[..., : self.nope], shared), -1)
        return _attend(queries, keys, expanded[..., self.nope :], self.scale)


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Causal softmax attention of q, k [T, heads, head_dim] and v [T, heads, v_dim] -> [T, heads *
    v_dim].
    """
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    hidden = torch.ones(len(q), len(q), dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, float("-inf")).softmax(-1)
    return torch.einsum("hts,shd->thd", weights, v).flatten(-2)
