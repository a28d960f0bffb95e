"""Latent attention as model files use it: projections and norms around the block `MLA`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from hmc.blocks import MLA, Columns, Growth, Linear, RMSNorm, Rotary, SparseMLA
from hmc.checkpoint.config import ModelConfig
from hmc.models.rope import Rope
from hmc.ops.pools import pooled_positions

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms: a constant of the architecture, whatever `rms_norm_eps` says."""


Indexer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Positions that tokens attend to, i32 [T, index_topk], of x [T, hidden], the query's latents [T,
q_lora_rank] and positions [T]."""


class LatentAttention(nn.Module):
    """Projections and norms around `MLA`; the query comes through a latent of its own where the
    config has one, and grows with its position as `growth` says. Without a `rope` the parts of
    heads that it would rotate stay as they are. Attention is to the positions that `indexer` gives,
    `index_topk` of them, or pools of `pool` each, where there is such; `sinks` names a vector of
    one more score a head then, and heads may be without a part to rotate. `eps` is that of the
    latent norms. A family that gates what comes out overrides `gated`.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope | None,
        growth: Growth | None = None,
        indexer: Indexer | None = None,
        sinks: str | None = None,
        pool: int = 0,
        eps: float = LATENT_EPS,
    ) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        heads = config.require_int("num_attention_heads", minimum=1)
        nope = config.require_int("qk_nope_head_dim", minimum=1)
        least = 2 if rope is not None or indexer is None else 0
        rotated = config.require_int("qk_rope_head_dim", minimum=least)
        v_dim = config.require_int("v_head_dim", minimum=1)
        rank = config.require_int("kv_lora_rank", minimum=1)
        q_rank = config.get_int("q_lora_rank", 0)
        bias = config.get_bool("attention_bias", False)
        width = heads * (nope + rotated)
        if q_rank:
            self.q_a_proj = Linear(hidden, q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, eps)
            self.q_b_proj = Linear(q_rank, width)
        else:
            self.q_proj = Linear(hidden, width)
        self.q_rank = q_rank
        self.kv_a_proj_with_mqa = Linear(hidden, rank + rotated, bias=bias)
        self.latent = Columns(0, 0, rank) if rotated else None
        self.k_rope = Columns(1, rank, rotated) if rotated else None
        self.kv_a_layernorm = RMSNorm(rank, eps)
        scale = (nope + rotated) ** -0.5
        self.q_rotary = self.k_rotary = None
        if rope is not None:
            pairs = config.get_bool("rope_interleave", True)
            turn = partial(Rotary, inv_freq=rope.inv_freq, interleaved=pairs, factor=rope.factor)
            self.q_rotary = turn(heads, nope + rotated, start=nope)
            self.k_rotary = turn(1, rotated)
            scale *= rope.mscale**2
        self.indexer = indexer
        if indexer is None:
            self.mla = MLA(heads, nope, rotated, v_dim, rank, scale, growth=growth)
        else:
            most = config.require_int("index_topk", minimum=1)
            most = pooled_positions(most, pool) if pool else most
            sizes = heads, nope, rotated, v_dim, rank
            self.mla = SparseMLA(*sizes, scale, most, sinks=sinks, pool=pool)
        self.o_proj = Linear(heads * v_dim, hidden, bias=bias)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        choice: tuple[Tensor, ...] = ()
        if self.q_rank:
            q_latent = self.q_a_layernorm(self.q_a_proj(x))
            q = self.q_b_proj(q_latent)
            if self.indexer is not None:
                choice = (self.indexer(x, q_latent, positions),)
        else:
            q = self.q_proj(x)
        compressed = self.kv_a_proj_with_mqa(x)
        if self.latent is None or self.k_rope is None:
            latent = self.kv_a_layernorm(compressed)
            return self.o_proj(self.gated(x, self.mla(q, latent, *choice)))  # type: ignore[no-any-return]
        latent = self.kv_a_layernorm(self.latent(compressed))
        k_rope = self.k_rope(compressed)
        if self.q_rotary is not None and self.k_rotary is not None:
            k_rope, q = self.k_rotary(k_rope, positions), self.q_rotary(q, positions)
        return self.o_proj(self.gated(x, self.mla(q, latent, k_rope, *choice)))  # type: ignore[no-any-return]

    def gated(self, x: Tensor, mixed: Tensor) -> Tensor:
        """What goes into the output projection, of the block's input and of what heads mixed."""
        return mixed
