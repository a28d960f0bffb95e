"""Block-sparse attention (MiniMax-M3): an indexer with keys of its own chooses blocks of
`index_block` positions, and attention reads those alone.

`index_blocks` scores a block, for each index head, by the largest q . k of the positions in it that
a token sees, and takes the `index_topk` best blocks, of equal ones the lower; before all others the
last `index_local` blocks, which end with the token's own. Where a token sees no more blocks than
that, all are chosen, and nothing is scored: attention is dense there, exactly. A positive factor of
all scores changes no choice, so the row has none.

`sparse_attention` is `attention` to what was chosen; an index head chooses for neighbouring key
heads. A token's own block is always among the chosen, so that how many positions it reads depends
on its own alone. Native kernels are those of `attention`, told what was chosen; on devices PyTorch
computes both.
"""

from __future__ import annotations

from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.ops.attention import POSITIONS, Bounds, attended, gqa_flops
from hmc.ops.row import (
    Attrs,
    Load,
    Op,
    Role,
    State,
    Use,
    Weights,
    Work,
    attr,
    picked,
    product,
    spec,
)
from hmc.ops.sparse import choice_work

_MADE = 4.0
"""Bytes of a score on devices."""
_CHOICE = ("index_block", "index_topk")


def chosen_positions(attrs: Attrs) -> int:
    """The most positions that a token attends to."""
    return int(attrs["index_topk"]) * int(attrs["index_block"])


def _possible(attrs: Attrs) -> bool:
    """Kernels take positions in pairs."""
    block, most = picked(attrs, *_CHOICE).values()
    return block > 0 and block % 2 == 0 and most > 0


# -- the indexer -----------------------------------------------------------------------------------


def _index(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "dim", "index_local", *_CHOICE) | {"block": use.block}
    append = spec("index_append", use, picked(attrs, "dim") | {"block": use.block})
    names = ("block_prefill",) if use.many else ("block_scores", "block_choose")
    return (append, *(spec(name, use, sizes) for name in names))


def _index_possible(attrs: Attrs) -> bool:
    heads, dim, local, most = picked(attrs, "heads", "dim", "index_local", "index_topk").values()
    return _possible(attrs) and heads > 0 and dim > 0 and dim % 2 == 0 and 0 < local <= most


# -- attention to what was chosen ------------------------------------------------------------------


def _sparse(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "kv_heads", "head_dim", "v_dim") | {"block": use.block}
    append, choice = spec("kv_append", use, sizes), picked(attrs, "index_heads", *_CHOICE)
    if use.many:
        return append, spec("attention_prefill", use, sizes | choice, out="bf16")
    return (
        append,
        spec("attention", use, sizes | choice, out="bf16"),
        spec("attention_join", use, sizes | choice, out="bf16"),
    )


def _sparse_possible(attrs: Attrs) -> bool:
    heads, kv_heads, index_heads = picked(attrs, "heads", "kv_heads", "index_heads").values()
    return (
        _possible(attrs)
        and min(kv_heads, index_heads) > 0
        and heads % kv_heads == 0
        and kv_heads % index_heads == 0
    )


def _sparse_work(attrs: Attrs, load: Load) -> Work:
    """A token reads so many positions; together the tokens of a prompt read them all."""
    most, every = chosen_positions(attrs), load.tokens * load.ranks
    pairs = attended(every, load.context, load.sequences, Bounds(window=most)) / load.ranks
    heads, head_dim, v_dim = picked(attrs, "heads", "head_dim", "v_dim").values()
    context = min(load.context, float(most)) if load.few else load.context
    keys = load.sequences * context + every
    return Work(1.0, load.rows, scores=gqa_flops(heads, head_dim, v_dim, pairs), keys=keys)


OPS: Final = (
    Op(
        "index_blocks",
        inputs=(
            Role("q", "f32", product("heads", "dim")),
            Role("indexer_k", "f32 bf16", attr("dim"), rows="all"),
            POSITIONS,
        ),
        # of each head numbers of blocks, ascending, -1 behind the last
        outputs=(Role("chosen", "i32", product("heads", "index_topk")),),
        attrs=dict.fromkeys(("heads", "dim", "index_local", *_CHOICE), int),
        possible=_index_possible,
        kernels=_index,
        states=lambda attrs: (State("indexer_k", int(attrs["dim"])),),
        work=lambda attrs, load: choice_work(attrs, load, chosen_positions(attrs), _MADE),
        launches=lambda attrs, load: 14,
        family="attention",
    ),
    Op(
        "sparse_attention",
        inputs=(
            Role("q", "f32", product("heads", "head_dim")),
            Role("k", "f32 bf16", product("kv_heads", "head_dim"), rows="all"),
            Role("v", "f32 bf16", product("kv_heads", "v_dim"), rows="all"),
            Role("chosen", "i32", product("index_heads", "index_topk")),
            POSITIONS,
        ),
        outputs=(Role("y", "bf16", product("heads", "v_dim")),),
        attrs={
            **dict.fromkeys(
                ("heads", "kv_heads", "head_dim", "v_dim", "index_heads", *_CHOICE), int
            ),
            "scale": float,
        },
        possible=_sparse_possible,
        kernels=_sparse,
        states=lambda attrs: (
            State("k", int(attrs["kv_heads"]) * int(attrs["head_dim"])),
            State("v", int(attrs["kv_heads"]) * int(attrs["v_dim"])),
        ),
        work=_sparse_work,
        launches=lambda attrs, load: 14,
        paged=lambda attrs, weights: "blocks that an indexer chooses",
        family="attention",
    ),
)
