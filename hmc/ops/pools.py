"""An indexer that chooses pools of positions (GLM-5.3): `pool` positions that follow each other
have one key, a mean of theirs weighed by a softmax in each column.

`index_pools` scores the pools that have ended as `index` does positions, and gives the positions of
the `index_topk` / `pool` best of them, of equal ones the lower, and behind these all of the pool
that is open at a token's own. So a token chooses all that it sees while these are no more than
`index_topk` + `pool` - 1. What is kept: the running softmax of the open pool, and in pages one key
a pool, which lies in the page of the last of its positions. Kernels are those of compressed rows
and of `index`; what they chose among pools becomes positions at last.
"""

from __future__ import annotations

from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.errors import UnsupportedError
from hmc.ops.attention import POSITIONS
from hmc.ops.compressed import PAGE, fields
from hmc.ops.row import (
    Attrs,
    Op,
    Role,
    State,
    Use,
    WeightRole,
    Weights,
    attr,
    picked,
    product,
    spec,
)
from hmc.ops.sparse import choice_work


def pooled_positions(index_topk: int, pool: int) -> int:
    """The most positions that a token chooses."""
    return index_topk + pool - 1


def _chosen(attrs: Attrs) -> int:
    return pooled_positions(*picked(attrs, "index_topk", "pool").values())


def _possible(attrs: Attrs) -> bool:
    heads, dim, most, pool = picked(attrs, "heads", "dim", "index_topk", "pool").values()
    whole = pool > 1 and PAGE % pool == dim % pool == most % pool == 0
    return whole and min(heads, dim, most) > 0


def _kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    heads, dim, most, pool = picked(attrs, "heads", "dim", "index_topk", "pool").values()
    if use.block % pool:
        raise UnsupportedError(f"pools of {pool} positions in pages of {use.block}")
    rows = {"width": dim, "ratio": pool, "overlap": 0, "block": use.block}
    sizes = {"heads": heads, "dim": dim, "block": use.block // pool, "index_topk": most // pool}
    names = ("index_prefill",) if use.many else ("index_scores", "index_choose")
    return (
        *(spec(name, use, rows) for name in ("compress", "compress_rows")),
        *(spec(name, use, sizes) for name in names),
        spec("pool_positions", use, {"index_topk": most, "pool": pool}),
    )


def _states(attrs: Attrs) -> tuple[State, ...]:
    dim, pool = picked(attrs, "dim", "pool").values()
    return (
        State("pools", dim // pool),
        State("pools_open", fields(attrs) * dim, "sequence", "f32"),
    )


_MADE = 4.0 + 8.0
"""Bytes of a score on devices, and of its place in their order."""

OPS: Final = (
    Op(
        "index_pools",
        inputs=(
            Role("q", "f32", product("heads", "dim")),
            Role("k", "f32", attr("dim")),
            Role("gate", "f32", attr("dim")),
            Role("weights", "f32", attr("heads")),
            POSITIONS,
        ),
        # ascending positions, -1 behind the last
        outputs=(Role("chosen", "i32", _chosen),),
        # what is added to the gates of a pool's positions, one after the other
        weights=(WeightRole("ape", lambda a: (int(a["pool"]), int(a["dim"])), vector=True),),
        attrs=dict.fromkeys(("heads", "dim", "index_topk", "pool"), int),
        possible=_possible,
        kernels=_kernels,
        states=_states,
        work=lambda attrs, load: choice_work(attrs, load, _chosen(attrs), _MADE),
        launches=lambda attrs, load: 64,
        captured=False,
        alone=True,
        family="attention",
    ),
)
