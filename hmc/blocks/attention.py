"""Rotary embedding and the two attentions; the reference computes every score of the prompt at
once.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from hmc.blocks.base import Block, parameter, sibling
from hmc.blocks.dense import RMSNorm
from hmc.graph import Attr, WeightSpec, attrs
from hmc.ops.attention import NO_BOUNDS, Bounds


class Rotary(Block):
    """Rotates elements [start, start + dim) of each of `heads` heads by position x `inv_freq` (dim
    / 2 floats).

    A pair is (i, i + dim / 2) of the slice, or (2i, 2i + 1) when `interleaved`; it stays where it
    is. `factor` scales cos and sin (YaRN's attention factor). `norm`, one gamma [head_dim] for all
    heads, is applied to each head first. Frequencies are multiplied by the exponentials of a
    weight [dim / 2] that checkpoints call `learned`, where there is one (LeRoPE).
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
        learned: str = "",
    ) -> None:
        super().__init__()
        self.heads, self.head_dim, self.rope = heads, head_dim, inv_freq
        self.start, self.interleaved, self.factor = start, int(interleaved), factor
        self.dim = 2 * len(inv_freq)
        self.width = heads * head_dim
        self.norm, self.eps = norm, norm.eps if norm else 0.0
        self.learned = learned
        self.alpha = parameter(len(inv_freq)) if learned else None

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return (WeightSpec("alpha", self.learned, (len(self.rope),)),) if self.learned else ()

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
            learned=self.learned,
        )

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        if self.norm is not None:
            x = self.norm(x)
        heads = x.reshape(len(x), self.heads, self.head_dim)
        part = heads[..., self.start : self.start + self.dim]
        inv_freq = torch.tensor(self.rope, dtype=torch.float32)
        if self.alpha is not None:
            inv_freq = inv_freq * self.alpha.exp()
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


class PositionScale(Block):
    """Each of `heads` heads of a token at position p times scale log(1 + p) + bias, two weights
    [heads] (scalable softmax, arXiv 2501.19399).
    """

    kind = "position_scale"

    def __init__(self, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads, self.head_dim, self.width = heads, head_dim, heads * head_dim
        self.scale, self.bias = parameter(heads), parameter(heads)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        return tuple(WeightSpec(n, f"{path}.{n}", (self.heads,)) for n in ("scale", "bias"))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        factor = torch.log1p(positions.float())[:, None] * self.scale + self.bias
        return (x.reshape(len(x), self.heads, self.head_dim) * factor[..., None]).flatten(-2)


@dataclass(frozen=True)
class Growth:
    """Queries that grow with their position p, by a factor 1 + by * log(1 + (p + start) // every)
    (Llama 4's attention temperature; `start` 1 there, 0 in Mistral 4).
    """

    by: float
    every: int
    start: int = 0


class Attention(Block):
    """Causal grouped-query attention: q [T, heads * head_dim], k [T, kv_heads * head_dim], v [T,
    kv_heads * v_dim].

    Query head h reads key head h // (heads / kv_heads). With a `window` a token sees so many
    positions, its own included; with a `chunk`, those of its own chunk of so many. `softcap` c
    makes c tanh(s / c) of a scaled score s. `sinks` is what the checkpoint calls a vector [heads]
    beside the block: one more score a head, whose value is 0. `growth` as in `Growth`.
    """

    kind = "attention"
    dtype = "bf16"

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        head_dim: int,
        v_dim: int,
        scale: float,
        *,
        window: int = 0,
        chunk: int = 0,
        softcap: float = 0.0,
        sinks: str | None = None,
        growth: Growth | None = None,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        self.v_dim, self.scale, self.bounds = v_dim, scale, Bounds(window, chunk)
        self.softcap, self.sinks_name, self.growth = softcap, sinks, growth
        self.width = heads * v_dim
        self.sinks = parameter(heads) if sinks else None

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        if self.sinks_name is None:
            return ()
        return (WeightSpec("sinks", sibling(path, self.sinks_name), (self.heads,)),)

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        options = {
            "window": self.bounds.window,
            "chunk": self.bounds.chunk,
            "softcap": self.softcap,
        }
        given = {name: value for name, value in options.items() if value}
        return attrs(**dict(super().attributes()), **given, **_attributes(self.growth))

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        queries = _grown(q, self.growth).reshape(len(q), self.heads, self.head_dim)
        group = self.heads // self.kv_heads
        keys = k.reshape(len(k), self.kv_heads, self.head_dim).repeat_interleave(group, 1)
        values = v.reshape(len(v), self.kv_heads, self.v_dim).repeat_interleave(group, 1)
        return _attend(queries, keys, values, self.scale, self.bounds, self.softcap, self.sinks)


class MLA(Block):
    """Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) over a compressed
    cache.

    q [T, heads * (nope + rope)], its rope part rotated; latent [T, rank], normed; k_rope [T, rope],
    rotated, shared by all heads. `kv_b` [heads * (nope + v_dim), rank] expands a latent to each
    head's key and value; a kernel absorbs it into the query and the result instead. Its checkpoint
    name is `kv_b_proj.weight` beside the block. `growth` as in `Growth`.
    """

    kind = "mla"
    dtype = "bf16"

    def __init__(
        self,
        heads: int,
        nope: int,
        rope: int,
        v_dim: int,
        rank: int,
        scale: float,
        *,
        growth: Growth | None = None,
    ) -> None:
        super().__init__()
        self.growth = growth
        self.heads, self.nope, self.rope, self.v_dim = heads, nope, rope, v_dim
        self.rank, self.scale = rank, scale
        self.width = heads * v_dim
        self.kv_b = parameter(heads * (nope + v_dim), rank)

    def weights(self, path: str) -> tuple[WeightSpec, ...]:
        shape = (self.heads * (self.nope + self.v_dim), self.rank)
        return (WeightSpec("kv_b", sibling(path, "kv_b_proj.weight"), shape, linear=True),)

    def attributes(self) -> tuple[tuple[str, Attr], ...]:
        return attrs(**dict(super().attributes()), **_attributes(self.growth))

    def forward(self, q: Tensor, latent: Tensor, k_rope: Tensor) -> Tensor:
        return self.attend(q, latent, k_rope)

    def attend(
        self,
        q: Tensor,
        latent: Tensor,
        k_rope: Tensor,
        unseen: Tensor | None = None,
        sinks: Tensor | None = None,
    ) -> Tensor:
        """The same; `unseen` [T, T] positions are hidden besides, `sinks` [heads] are scores of one
        more, whose value is 0.
        """
        queries = _grown(q, self.growth).reshape(len(q), self.heads, self.nope + self.rope)
        expanded = (latent @ self.kv_b.T).reshape(len(q), self.heads, self.nope + self.v_dim)
        shared = k_rope[:, None, :].expand(-1, self.heads, -1)
        keys = torch.cat((expanded[..., : self.nope], shared), -1)
        values = expanded[..., self.nope :]
        return _attend(queries, keys, values, self.scale, sinks=sinks, unseen=unseen)


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float,
    bounds: Bounds = NO_BOUNDS,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    unseen: Tensor | None = None,
) -> Tensor:
    """Causal softmax attention of q, k [T, heads, head_dim] and v [T, heads, v_dim] -> [T, heads *
    v_dim].
    """
    scores = torch.einsum("thd,shd->hts", q, k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    place = torch.arange(len(q))
    hidden = (place > place[:, None]) | (place < bounds.first(place)[:, None])
    hidden = hidden if unseen is None else hidden | unseen
    scores = scores.masked_fill(hidden, float("-inf"))
    if sinks is not None:
        scores = torch.cat((scores, sinks[:, None, None].expand(-1, len(q), 1)), -1)
    weights = scores.softmax(-1)[..., : len(q)]
    return torch.einsum("hts,shd->thd", weights, v).flatten(-2)


def _grown(q: Tensor, growth: Growth | None) -> Tensor:
    """Queries [T, width] from position 0 on."""
    if growth is None:
        return q
    steps = (torch.arange(len(q)) + growth.start) // growth.every
    return q * (1 + growth.by * torch.log1p(steps.float()))[:, None]


def _attributes(growth: Growth | None) -> dict[str, Attr]:
    if growth is None:
        return {}
    return {
        "growth": growth.by,
        "growth_every": growth.every,
        "growth_from": growth.start,
    }
