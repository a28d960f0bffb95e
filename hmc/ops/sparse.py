"""Sparse latent attention (DeepSeek-V3.2, arXiv 2512.02556, section 2.1): an indexer with keys of
its own chooses the positions that latent attention reads.

`index` scores every position up to a token's own, sum over heads h of weights_h relu(q_h . k) with
q and k rounded to bf16, and gives the `index_topk` best of them, of equal ones the lower. A
positive factor of all scores changes no choice, so the row has none. Where a token sees no more
positions than that, all are chosen, and nothing is scored: attention is dense there, exactly.

`sparse_mla` is `mla` over what was chosen, by an indexer of the same layer or of an earlier one;
latents may be without a rotated part. Where pools were chosen (pools.py), `index_topk` is the most
positions that these are.
Native kernels gather the rows that a token reads and attend to these as to a cache; those of many
tokens lift keys and values as `mla` does for as long as attention is dense. They switch at
`index_topk`: before it there is nothing to choose, and after it attention to all positions would
have to be masked by the choice, which no kernel does. By flops alone that would be cheaper while a
token sees fewer than (2 rank + rope) / (nope + rope + v_dim) times `index_topk` positions, 3.4
times as many for the published sizes. Positions are what the kernels of `index` wrote; those that
read them take none beyond the token's own. Latents may have no rotated part (`rope` 0), and be
those that an earlier layer, the `source`, keeps: the step is given the new ones, and appends none.
On devices PyTorch computes both ops.
"""

from __future__ import annotations

from typing import Final

from hmc.codegen.spec import MAX_TOKENS, KernelSpec
from hmc.ops.attention import (
    POSITIONS,
    Bounds,
    attended,
    kv_b_shape,
    mla_flops,
    mla_lifted_flops,
)
from hmc.ops.row import (
    Attrs,
    Load,
    Op,
    Role,
    State,
    Use,
    WeightRole,
    Weights,
    Work,
    attr,
    picked,
    product,
    spec,
)

# -- the indexer -----------------------------------------------------------------------------------


def _index(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "dim", "index_topk") | {"block": use.block}
    names = (
        "index_append",
        *(("index_prefill",) if use.many else ("index_scores", "index_choose")),
    )
    return tuple(spec(name, use, sizes) for name in names)


def dense_tokens(load: Load, most: int) -> float:
    """Of a sequence's new tokens, those that see no more than the `most` positions they may
    choose.
    """
    own = load.tokens * load.ranks / load.sequences
    return min(own, max(0.0, most - load.context))


def choice_work(attrs: Attrs, load: Load, most: int, made: float) -> Work:
    """An indexer's, of `heads` heads of `dim` columns: tokens for which attention is not dense
    score every position, or `pool` of them, that they see, and each score is `made` bytes of
    temporaries on a GPU.
    """
    every, few = load.tokens * load.ranks, dense_tokens(load, most)
    dense = attended(load.sequences * few, load.context, load.sequences)
    pairs = (attended(every, load.context, load.sequences) - dense) / load.ranks
    pairs /= int(attrs.get("pool", 1))
    heads, dim = picked(attrs, "heads", "dim").values()
    keys = every + (load.sequences * load.context if pairs else 0.0)
    return Work(1.0, load.rows, scores=2.0 * heads * dim * pairs, keys=keys, made=made * pairs)


_MADE = 4.0 + 8.0
"""Bytes of a score on devices, and of its place in their order."""


# -- latent attention to what was chosen -----------------------------------------------------------


def _sparse_mla(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "nope", "rope", "v_dim", "rank") | {"block": use.block}
    append = () if "source" in attrs else (spec("mla_append", use, sizes),)
    stored = weights["kv_b"]
    most = picked(attrs, "index_topk", *(name for name in ("pool",) if name in attrs))
    sinks = {"sinks": 1} if "sinks" in weights else {}
    if use.many:
        expand = sizes | stored.sizes | most | sinks
        apart = expand | {"tokens": MAX_TOKENS}
        return (
            *append,
            spec("mla_prefill", use, expand, stored.format, "bf16"),
            spec("sparse_mla_prefill", use, apart, stored.format, "bf16"),
        )
    sizes["tokens"] = use.tokens
    expand = sizes | stored.sizes
    return (
        spec("mla_absorb", use, expand, stored.format),
        *append,
        spec("mla_gather", use, sizes | most),
        spec("mla_attention", use, sizes, out="bf16"),
        spec("mla_attention_join", use, sizes | sinks, out="bf16"),
        spec("mla_up", use, expand, stored.format, "bf16"),
    )


def _sparse_operands(attrs: Attrs) -> tuple[str, ...]:
    """Latents without a rotated part have no such operand."""
    rotated = ("k_rope",) if attrs["rope"] else ()
    return "q", "latent", *rotated, "chosen", "kv_b"


def _latents(attrs: Attrs) -> tuple[State, ...]:
    """Nothing where an earlier layer keeps them."""
    width = int(attrs["rank"]) + int(attrs["rope"])
    return () if "source" in attrs else (State("latent", width),)


def _sparse_work(attrs: Attrs, load: Load) -> Work:
    """A token reads `index_topk` rows, absorbed; tokens for which attention is dense, of a call of
    many, all read the same ones, as `mla` does."""
    most, every = int(attrs["index_topk"]), load.tokens * load.ranks
    pairs = attended(every, load.context, load.sequences, Bounds(window=most)) / load.ranks
    heads, rope, rank = picked(attrs, "heads", "rope", "rank").values()
    dense = 0.0 if load.few else load.sequences * dense_tokens(load, most)
    alike = attended(dense, load.context, load.sequences) / load.ranks
    keys = load.sequences * load.context + dense if dense else 0.0
    flops = mla_lifted_flops if load.lifted else mla_flops
    scores = flops(attrs, alike, dense / load.ranks, keys) if dense else 0.0
    scores += 2.0 * heads * (2 * rank + rope) * (pairs - alike)
    read = keys + pairs - alike
    gathered = 4.0 * (rank + rope) * (pairs - alike)
    return Work(1.0, load.rows, scores=scores, keys=read, made=2.0 * gathered)


OPS: Final = (
    Op(
        "index",
        inputs=(
            Role("q", "f32", product("heads", "dim")),
            Role("indexer_k", "f32 bf16", attr("dim"), rows="all"),
            Role("weights", "f32", attr("heads")),
            POSITIONS,
        ),
        # ascending positions, -1 behind the last
        outputs=(Role("chosen", "i32", attr("index_topk")),),
        attrs=dict.fromkeys(("heads", "dim", "index_topk"), int),
        possible=lambda a: min(picked(a, "heads", "dim", "index_topk").values()) > 0,
        kernels=_index,
        states=lambda a: (State("indexer_k", int(a["dim"])),),
        work=lambda attrs, load: choice_work(attrs, load, int(attrs["index_topk"]), _MADE),
        launches=lambda attrs, load: 12,
        family="attention",
    ),
    Op(
        "sparse_mla",
        inputs=(
            Role("q", "f32", lambda a: int(a["heads"]) * (int(a["nope"]) + int(a["rope"]))),
            Role("latent", "f32 bf16", attr("rank"), rows="all"),
            Role("k_rope", "f32 bf16", attr("rope"), rows="all", optional=True),
            Role("chosen", "i32", attr("index_topk")),
            POSITIONS,
        ),
        outputs=(Role("y", "bf16", product("heads", "v_dim")),),
        weights=(
            WeightRole("kv_b", kv_b_shape, matmul=True),
            # scores of one more position a head, whose value is 0 (Hy4)
            WeightRole("sinks", lambda attrs: (int(attrs["heads"]),), optional=True, vector=True),
        ),
        attrs={
            **dict.fromkeys(("heads", "nope", "rope", "v_dim", "rank", "index_topk"), int),
            "scale": float,
        },
        # source: the earlier layer whose cached latents these are, where it is not the step's
        extra={"pool": int, "source": int},
        possible=lambda a: 0 < int(a.get("pool", 1)) <= int(a["index_topk"]),
        kernels=_sparse_mla,
        states=_latents,
        named=_sparse_operands,
        work=_sparse_work,
        launches=lambda attrs, load: 16,
        paged=lambda attrs, weights: "latents that an indexer chooses",
        family="attention",
    ),
)
