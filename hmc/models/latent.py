"""Latent attention as model files use it: projections and norms around the block `MLA`."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from hmc.blocks import MLA, Columns, Growth, Linear, RMSNorm, Rotary, SparseMLA
from hmc.checkpoint.config import ModelConfig
from hmc.models.rope import Rope

LATENT_EPS = 1e-6
"""Epsilon of the two latent norms: a constant of the architecture, whatever `rms_norm_eps` says."""


Indexer = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Positions that tokens attend to, i32 [T, index_topk], of x [T, hidden], the query's latents [T,
q_lora_rank] and positions [T]."""


class LatentAttention(nn.Module):
    """Projections and norms around `MLA`; the query comes through a latent of its own where the
    config has one, and grows with its position as `growth` says. Attention is to the positions that
    `chooses` gives, `index_topk` of them, where there is such.
    """

    def __init__(
        self,
        config: ModelConfig,
        rope: Rope,
        growth: Growth | None = None,
        indexer: Indexer | None = None,
    ) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        heads = config.require_int("num_attention_heads", minimum=1)
        nope = config.require_int("qk_nope_head_dim", minimum=1)
        rotated = config.require_int("qk_rope_head_dim", minimum=2)
        v_dim = config.require_int("v_head_dim", minimum=1)
        rank = config.require_int("kv_lora_rank", minimum=1)
        q_rank = config.get_int("q_lora_rank", 0)
        bias = config.get_bool("attention_bias", False)
        width = heads * (nope + rotated)
        if q_rank:
            self.q_a_proj = Linear(hidden, q_rank, bias=bias)
            self.q_a_layernorm = RMSNorm(q_rank, LATENT_EPS)
            self.q_b_proj = Linear(q_rank, width)
        else:
            self.q_proj = Linear(hidden, width)
        self.q_rank = q_rank
        self.kv_a_proj_with_mqa = Linear(hidden, rank + rotated, bias=bias)
        self.latent = Columns(0, 0, rank)
        self.k_rope = Columns(1, rank, rotated)
        self.kv_a_layernorm = RMSNorm(rank, LATENT_EPS)
        pairs = config.get_bool("rope_interleave", True)
        self.q_rotary = Rotary(
            heads,
            nope + rotated,
            rope.inv_freq,
            start=nope,
            interleaved=pairs,
            factor=rope.factor,
        )
        self.k_rotary = Rotary(1, rotated, rope.inv_freq, interleaved=pairs, factor=rope.factor)
        scale = (nope + rotated) ** -0.5 * rope.mscale**2
        self.indexer = indexer
        if indexer is None:
            self.mla = MLA(heads, nope, rotated, v_dim, rank, scale, growth=growth)
        else:
            most = config.require_int("index_topk", minimum=1)
            self.mla = SparseMLA(heads, nope, rotated, v_dim, rank, scale, most)
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
        latent = self.kv_a_layernorm(self.latent(compressed))
        k_rope = self.k_rotary(self.k_rope(compressed), positions)
        q = self.q_rotary(q, positions)
        return self.o_proj(self.mla(q, latent, k_rope, *choice))  # type: ignore[no-any-return]
