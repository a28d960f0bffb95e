"""DeepSeek-V4: attention over a window and over compressed rows, some layers with an indexer;
hyper-connections around both halves of a layer; experts chosen by token id in the first layers.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from hmc.blocks import (
    CompressedAttention,
    Compression,
    Embedding,
    Experts,
    GatedMLP,
    GroupedLinear,
    HashRoute,
    Linear,
    RMSNorm,
    Rotary,
    Route,
    RowIndex,
    Scoring,
    place,
)
from hmc.checkpoint.config import ModelConfig
from hmc.models.activations import ACTIVATIONS, gated
from hmc.models.common import check_values, norm_eps
from hmc.models.family import LOOKS_AHEAD, Aside, Family
from hmc.models.rope import Rope, rope
from hmc.models.routing import routed_experts
from hmc.models.streams import Half, LastRead, spread

INDEXED, UNINDEXED = 4, 128
"""Tokens of a compressed row in layers with an indexer, whose windows overlap, and without."""


class Model(nn.Module):
    """Embedding, layers and head over several streams: (ids [T], positions [T]) -> logits."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size", minimum=1)
        vocab = config.require_int("vocab_size", minimum=1)
        depth = config.require_int("num_hidden_layers", minimum=1)
        self.embed = Embedding(vocab, hidden)
        self.spread = spread(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(depth))
        self.hc_head = place(LastRead(config), depth - 1, "mlp")
        self.norm = place(RMSNorm(hidden, norm_eps(config)), -1, "head")
        self.head = place(Linear(hidden, vocab), -1, "head")

    def forward(self, ids: Tensor, positions: Tensor) -> Tensor:
        h = self.spread(self.embed(ids))
        for layer in self.layers:
            h = layer(h, positions, ids)
        return self.head(self.norm(self.hc_head(h)))  # type: ignore[no-any-return]


class Layer(nn.Module):
    """Attention and routed MLP over several streams."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.attn = place(Half(config, Attention(config, index)), index, "attention")
        self.ffn = place(Half(config, MoE(config, index)), index, "mlp")

    def forward(self, h: Tensor, positions: Tensor, ids: Tensor) -> Tensor:
        return self.ffn(self.attn(h, positions), ids)  # type: ignore[no-any-return]


class _Compressor(nn.Module):
    """The projections of a compressor; its other weights are the attention's."""

    def __init__(self, hidden: int, width: int) -> None:
        super().__init__()
        self.wkv, self.wgate = (Linear(hidden, width, plain=True) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.wkv(x), self.wgate(x)


class _Indexer(nn.Module):
    """The projections of an indexer: queries of the query's latent, weights of heads, and its
    compressor.
    """

    def __init__(self, hidden: int, rank: int, index: RowIndex, angles: Rope) -> None:
        super().__init__()
        self.wq_b = Linear(rank, index.heads * index.dim)
        self.weights_proj = Linear(hidden, index.heads, plain=True)
        self.compressor = _Compressor(hidden, 2 * index.dim)
        self.rotary = _rotary(index.heads, index.dim, angles.inv_freq)

    def forward(self, x: Tensor, latent: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        queries = self.rotary(self.wq_b(latent), positions)
        return *self.compressor(x), queries, self.weights_proj(x)


class Attention(nn.Module):
    """One row of keys for all heads, which is the values too; what heads give is turned back, and
    goes out through a matrix for each group of them.
    """

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden, eps = config.require_int("hidden_size"), norm_eps(config)
        heads = config.require_int("num_attention_heads", minimum=1)
        dim = config.require_int("head_dim", minimum=2)
        rank = config.require_int("q_lora_rank", minimum=1)
        groups = config.require_int("o_groups", minimum=1)
        out = config.require_int("o_lora_rank", minimum=1)
        if heads % groups:
            raise config.error("o_groups", f"is {groups}, must divide the {heads} heads")
        ratio, angles = _ratio(config, index), _angles(config, index)
        self.heads, self.dim, self.eps = heads, dim, eps
        self.wq_a, self.q_norm = Linear(hidden, rank), RMSNorm(rank, eps)
        self.wq_b = Linear(rank, heads * dim)
        self.wkv, self.kv_norm = Linear(hidden, dim), RMSNorm(dim, eps)
        back = tuple(-angle for angle in angles.inv_freq)
        self.q_rotary, self.back = (_rotary(heads, dim, each) for each in (angles.inv_freq, back))
        self.kv_rotary = _rotary(1, dim, angles.inv_freq)
        compression = index_of = None
        if ratio:
            compression = Compression(ratio, ratio == INDEXED, angles.inv_freq, eps)
            self.compressor = _Compressor(hidden, dim * (1 + compression.overlap))
        if ratio == INDEXED:
            index_of = RowIndex(
                config.require_int("index_n_heads", minimum=1),
                config.require_int("index_head_dim", minimum=1),
                config.require_int("index_topk", minimum=1),
            )
            self.indexer = _Indexer(hidden, rank, index_of, angles)
        self.ratio = ratio
        self.attention = CompressedAttention(
            heads,
            dim,
            config.require_int("sliding_window", minimum=1),
            dim**-0.5,
            sinks="attn_sink",
            compression=compression,
            index=index_of,
        )
        self.wo_a = GroupedLinear(groups, heads * dim // groups, out)
        self.wo_b = Linear(groups * out, hidden)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        latent = self.q_norm(self.wq_a(x))
        q = self.wq_b(latent).unflatten(-1, (self.heads, self.dim))
        q = (q * torch.rsqrt(q.square().mean(-1, keepdim=True) + self.eps)).flatten(-2)
        kv = self.kv_rotary(self.kv_norm(self.wkv(x)), positions)
        more: tuple[Tensor, ...] = self.compressor(x) if self.ratio else ()
        if self.ratio == INDEXED:
            more = (*more, *self.indexer(x, latent, positions))
        mixed = self.back(self.attention(self.q_rotary(q, positions), kv, *more), positions)
        return self.wo_b(self.wo_a(mixed))  # type: ignore[no-any-return]


class MoE(nn.Module):
    """Routed experts, by scores or by token id, and a shared one; activations are bounded."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        hidden = config.require_int("hidden_size")
        inner = config.require_int("moe_intermediate_size", minimum=1)
        experts, top_k = routed_experts(config, "n_routed_experts")
        act = gated(ACTIVATIONS["silu"], limit=config.get_float("swiglu_limit", 10.0))
        factor = config.get_float("routed_scaling_factor", 1.5)
        self.hashed = index < config.get_int("num_hash_layers", 3)
        self.gate = Linear(hidden, experts)
        score = Scoring.SQRT_SOFTPLUS
        if self.hashed:
            self.route: nn.Module = HashRoute(
                experts,
                top_k,
                score,
                vocab=config.require_int("vocab_size"),
                name="gate.tid2eid",
                normalise=True,
                factor=factor,
            )
        else:
            self.route = Route(
                experts, top_k, score, normalise=True, factor=factor, bias_name="gate.bias"
            )
        self.experts = Experts(experts, hidden, inner, top_k, ("w1", "w3", "w2"), act)
        shared = config.get_int("n_shared_experts", 1, minimum=1)
        self.shared_experts = GatedMLP(hidden, inner * shared, act=act)

    def forward(self, x: Tensor, ids: Tensor) -> Tensor:
        logits = self.gate(x)
        routing = self.route(logits, ids) if self.hashed else self.route(logits)
        return self.experts(x, routing) + self.shared_experts(x)  # type: ignore[no-any-return]


def _rotary(heads: int, dim: int, inv_freq: tuple[float, ...]) -> Rotary:
    """Neighbours are turned, at the end of each head."""
    start = dim - 2 * len(inv_freq)
    return Rotary(heads, dim, inv_freq, start=start, interleaved=True)


def _ratio(config: ModelConfig, index: int) -> int:
    """Tokens of a compressed row of a layer; 0: it has none."""
    depth, found = config.require_int("num_hidden_layers"), config.get_ints("compress_ratios")
    if len(found) < depth or {*found} - {0, INDEXED, UNINDEXED}:
        raise config.error("compress_ratios", f"must say 0, 4 or 128 for each of {depth} layers")
    return found[index]


def _angles(config: ModelConfig, index: int) -> Rope:
    """Layers with compressed rows have another base, and a longer context; cos and sin are not
    scaled there.
    """
    rotated = config.require_int("qk_rope_head_dim", minimum=2)
    if rotated > min(config.require_int("head_dim"), config.get_int("index_head_dim", rotated)):
        raise config.error("qk_rope_head_dim", f"is {rotated}, more than a head has")
    if not _ratio(config, index):
        return rope(config.with_text(rope_scaling=None), rotated)
    theta = config.get_float("compress_rope_theta", 160000.0)
    return Rope(rope(config.with_text(rope_theta=theta), rotated).inv_freq)


def build(config: ModelConfig) -> nn.Module:
    """The model of a DeepSeek-V4 config.json."""
    check_values(
        config,
        scoring_func="sqrtsoftplus",
        topk_method="noaux_tc",
        hidden_act="silu",
        norm_topk_prob=True,
        num_key_value_heads=1,
        attention_bias=False,
        mlp_bias=False,
        tie_word_embeddings=False,
    )
    return Model(config)


def _ahead(config: ModelConfig) -> tuple[Aside, ...]:
    return (Aside("mtp.*", LOOKS_AHEAD),)


_NAMES: tuple[tuple[str, str], ...] = (
    (r"^hc_head\.fn\.weight$", "hc_head_fn"),
    (r"^hc_head\.(base|scale)$", r"hc_head_\1"),
    (r"\.(attn|ffn)\.hc\.fn\.weight$", r".hc_\1_fn"),
    (r"\.(attn|ffn)\.hc\.(base|scale)$", r".hc_\1_\2"),
    (r"\.(attn|ffn)\.norm\.weight$", r".\1_norm.weight"),
    (r"\.(attn|ffn)\.inner\.", r".\1."),
    (r"\.shared_experts\.gate_proj\.", ".shared_experts.w1."),
    (r"\.shared_experts\.up_proj\.", ".shared_experts.w3."),
    (r"\.shared_experts\.down_proj\.", ".shared_experts.w2."),
)

FAMILIES = (
    Family(
        "deepseek_v4",
        build,
        "compressed keys, indexer, hyper-connections, experts by token id",
        ("deepseek-ai/DeepSeek-V4-Flash", "deepseek-ai/DeepSeek-V4-Pro"),
        names=_NAMES,
        aside=_ahead,
    ),
)
