"""A family of tests alone, whose layers attend in all the ways that attention can be asked for:
windows, chunks, sinks, soft caps, queries that grow with their position; keys that are the values,
norms before and after rotary embedding, or none of it; keys and values of another layer; other
heads of other sizes in every layer.
"""

from __future__ import annotations

from typing import Any

import quirky
import torch
from torch import Tensor, nn

from hmc.blocks import Attention, Growth, Linear, RMSNorm, Rotary
from hmc.checkpoint.config import ModelConfig
from hmc.models import Family
from hmc.models.common import CausalLM

HIDDEN = quirky.HIDDEN


def unit(x: Tensor, heads: int) -> Tensor:
    """Heads of length one each, in the mean of squares."""
    parts = x.unflatten(-1, (heads, -1))
    return (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + 1e-6)).flatten(-2)


class _Attending(nn.Module):
    """Projections around an attention of given sizes and options."""

    def __init__(
        self,
        heads: int,
        kv_heads: int,
        dim: int,
        v_dim: int,
        *,
        values: bool = True,
        **options: Any,
    ) -> None:
        super().__init__()
        self.heads, self.kv_heads = heads, kv_heads
        self.q_proj, self.k_proj = Linear(HIDDEN, heads * dim), Linear(HIDDEN, kv_heads * dim)
        self.v_proj = Linear(HIDDEN, kv_heads * v_dim)
        self.o_proj = Linear(heads * v_dim, HIDDEN)
        self.attention = Attention(heads, kv_heads, dim, v_dim, dim**-0.5, **options)


def _rotaries(heads: tuple[int, int], dim: int, pairs: int, **options: Any) -> tuple[Rotary, ...]:
    angles = tuple(100.0 ** -(i / pairs) for i in range(pairs))
    return tuple(Rotary(each, dim, angles, **options) for each in heads)


class Sliding(_Attending):
    """Sinks and a window; a third of each head is turned, heads of values are narrower."""

    def __init__(self) -> None:
        super().__init__(6, 2, 24, 16, window=7, sinks="sinks")
        self.q_rotary, self.k_rotary = _rotaries((6, 2), 24, 4, interleaved=True)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k = self.q_rotary(self.q_proj(x), positions), self.k_rotary(self.k_proj(x), positions)
        return self.o_proj(self.attention(q, k, self.v_proj(x)))  # type: ignore[no-any-return]


class KeysAreValues(_Attending):
    """One key head, whose keys before norm and rotary embedding are the values; soft cap."""

    def __init__(self) -> None:
        super().__init__(12, 1, 8, 8, softcap=2.0)
        del self.v_proj
        self.q_norm, self.k_norm = RMSNorm(8, 1e-6, 12), RMSNorm(8, 1e-6, 1)
        self.q_rotary, self.k_rotary = _rotaries((12, 1), 8, 4)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k = self.q_proj(x), self.k_proj(x)
        values = unit(k, 1)
        q, k = (
            self.q_rotary(self.q_norm(q), positions),
            self.k_rotary(self.k_norm(k), positions),
        )
        return self.o_proj(self.attention(q, k, values))  # type: ignore[no-any-return]


class Chunked(_Attending):
    """Chunks; norms come after rotary embedding, one with weights and one without."""

    def __init__(self) -> None:
        super().__init__(4, 4, 24, 24, chunk=12)
        self.q_rotary, self.k_rotary = _rotaries((4, 4), 24, 12)
        self.q_norm = RMSNorm(24, 1e-6, 4)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        q, k = self.q_rotary(self.q_proj(x), positions), self.k_rotary(self.k_proj(x), positions)
        q, k, v = self.q_norm(q), unit(k, 4), self.v_proj(x)
        return self.o_proj(self.attention(q, k, v))  # type: ignore[no-any-return]


class Plain(_Attending):
    """No rotary embedding; queries grow."""

    def __init__(self) -> None:
        super().__init__(3, 1, 20, 32, growth=Growth(0.4, 5, 1))

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        self.kept = self.k_proj(x), self.v_proj(x)
        return self.o_proj(self.attention(self.q_proj(x), *self.kept))  # type: ignore[no-any-return]


class Sharing(_Attending):
    """Keys and values are those of the layer before."""

    def __init__(self, before: Plain) -> None:
        super().__init__(3, 1, 20, 32)
        del self.k_proj, self.v_proj
        self._before = (before,)  # a tuple, so that its weights are not this layer's

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        mixed = self.attention(self.q_proj(x), *self._before[0].kept)
        return self.o_proj(mixed)  # type: ignore[no-any-return]


def kinds() -> tuple[_Attending, ...]:
    """The attention of each layer."""
    plain = Plain()
    return Sliding(), KeysAreValues(), Chunked(), plain, Sharing(plain)


class Layer(nn.Module):
    """A pre-norm layer."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.input_layernorm, self.post_attention_layernorm = (
            RMSNorm(HIDDEN, 1e-6) for _ in range(2)
        )
        self.self_attn, self.mlp = attention, quirky.SparseMoe()

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        """The modules of the layer's first half."""
        return self.input_layernorm, self.self_attn

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        h = h + self.self_attn(self.input_layernorm(h), positions)
        return h + self.mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


def build(config: ModelConfig) -> nn.Module:
    """The model of a config.json."""
    return CausalLM(config, [Layer(each) for each in kinds()].__getitem__)


FAMILY = Family("attending", build)
