"""Attention over a window and over compressed rows of what lies before (DeepSeek-V4): one row of
keys, which is the values too, for all heads.

Every `ratio` tokens become one row, a mean of theirs weighed by a softmax in each column, normed
and turned; where windows of tokens `overlap`, of those of two windows, which have columns of their
own for each. A token sees the rows of all windows that have ended, or the `index_topk` of them
that an indexer with compressed keys of its own scores highest. What is kept: the last `window`
rows of keys, the running softmax of the open window, and in pages one row a `ratio` tokens, which
lies in the page of the last of these.
"""

from __future__ import annotations

from collections.abc import Collection
from math import gcd
from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.errors import UnsupportedError
from hmc.ops.attention import Bounds, attended
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

PAGE = 64
"""Tokens of a page, in which rows of more tokens take as much as rows of so many."""

ROWS = ("ratio", "overlap", "rope_dim", "rope", "eps")
INDEX = ("index_heads", "index_dim", "index_topk")
"""Attributes of layers that have compressed rows, and of those that choose among them."""

_KV = ("q", "kv")
_COMPRESSED = ("rows_kv", "rows_gate")
_INDEXED = ("index_kv", "index_gate", "index_q", "index_weights")


def row_tokens(ratio: int) -> int:
    """Tokens of a page that share a row's place."""
    return gcd(ratio, PAGE)


def fields(attrs: Attrs) -> int:
    """Numbers a column that a running softmax keeps: maximum, sum and weighted sum; where windows
    overlap of three of these.
    """
    return 9 if attrs.get("overlap") else 3


def _named(attrs: Attrs) -> Collection[str]:
    found = [*_KV, "sinks"]
    if "ratio" in attrs:
        found += [*_COMPRESSED, "ape", "gamma"]
    if "index_topk" in attrs:
        found += [*_INDEXED, "index_ape", "index_gamma"]
    return found


def _possible(attrs: Attrs) -> bool:
    for names in (ROWS, INDEX):
        given = [name in attrs for name in names]
        if any(given) != all(given):
            return False
    heads, head_dim, window = picked(attrs, "heads", "head_dim", "window").values()
    if min(heads, head_dim, window) < 1 or ("index_topk" in attrs and "ratio" not in attrs):
        return False
    if "ratio" not in attrs:
        return True
    ratio, overlap, dim = picked(attrs, "ratio", "overlap", "rope_dim").values()
    widths = [head_dim, *([int(attrs["index_dim"])] if "index_dim" in attrs else [])]
    whole = ratio > 1 and all(width % row_tokens(ratio) == 0 for width in widths)
    turned = dim > 0 and dim % 2 == 0 and all(dim <= width for width in widths)
    index = [int(attrs[name]) for name in INDEX if name in attrs]
    apart = not index or row_tokens(ratio) == ratio
    return whole and turned and overlap in (0, 1) and all(index) and apart


def _states(attrs: Attrs) -> tuple[State, ...]:
    head_dim, window = picked(attrs, "head_dim", "window").values()
    found = [State("window", window * head_dim, "sequence")]
    for name, width in (("rows", head_dim), ("index_rows", int(attrs.get("index_dim", 0)))):
        if "ratio" in attrs and width:
            found.append(State(name, width // row_tokens(int(attrs["ratio"]))))
            found.append(State(f"{name}_open", fields(attrs) * width, "sequence", "f32"))
    return tuple(found)


def _kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    window = picked(attrs, "head_dim", "window")
    found = [spec("window_gather" if use.many else "window_append", use, window)]
    sizes = picked(attrs, "heads", "head_dim", "window") | {"block": use.block}
    if "ratio" in attrs:
        if use.block % row_tokens(int(attrs["ratio"])):
            raise UnsupportedError(f"rows of {attrs['ratio']} tokens in pages of {use.block}")
        rows = picked(attrs, "ratio", "overlap", "rope_dim") | {"block": use.block}
        for name in ("head_dim", "index_dim") if "index_dim" in attrs else ("head_dim",):
            own = {**rows, "width": int(attrs[name])}
            found += [spec("compress", use, own), spec("compress_rows", use, own)]
        sizes["ratio"] = int(attrs["ratio"])
    if "index_topk" in attrs:
        # kernels of the indexer of sparse attention: a page has so many of its rows
        index = {"block": use.block // int(attrs["ratio"]), **picked(attrs, "index_topk")}
        index |= {"heads": int(attrs["index_heads"]), "dim": int(attrs["index_dim"])}
        names = ("index_prefill",) if use.many else ("index_scores", "index_choose")
        found += [spec(name, use, index) for name in names]
        sizes["index_topk"] = int(attrs["index_topk"])
    found.append(spec("attend_prefill" if use.many else "attend_few", use, sizes))
    return tuple(found)


def _work(attrs: Attrs, load: Load) -> Work:
    """Scores over head_dim and sums over as much for every row that is seen; an indexer's over its
    own rows. Keys read are counted in tokens of the paged rows.
    """
    heads, head_dim, window = picked(attrs, "heads", "head_dim", "window").values()
    every = load.tokens * load.ranks
    of_window = attended(every, load.context, load.sequences, Bounds(window))
    flops, keys = 4.0 * heads * head_dim * of_window, 0.0
    if "ratio" in attrs:
        ratio = int(attrs["ratio"])
        pairs = attended(every, load.context, load.sequences) / ratio
        seen = pairs
        if "index_topk" in attrs:
            index_heads, index_dim, top = picked(attrs, *INDEX).values()
            flops += 2.0 * index_heads * index_dim * pairs
            seen = min(pairs, every * top)
        flops += 4.0 * heads * head_dim * seen
        keys = load.sequences * load.context + every
    return Work(1.0, load.rows, scores=flops / load.ranks, keys=keys)


def _input(name: str, width: str) -> Role:
    """What a compressor reads: columns of two windows where they overlap."""
    return Role(name, "f32", lambda a: int(a[width]) * (1 + int(a["overlap"])), optional=True)


def _ape(name: str, width: str) -> WeightRole:
    def shape(attrs: Attrs) -> tuple[int, ...]:
        if width not in attrs or "ratio" not in attrs:
            return ()
        return int(attrs["ratio"]), int(attrs[width]) * (1 + int(attrs["overlap"]))

    return WeightRole(name, shape, optional=True, vector=True)


def _gamma(name: str, width: str) -> WeightRole:
    return WeightRole(name, lambda a: (int(a.get(width, 0)),), optional=True, vector=True)


OPS: Final = (
    Op(
        "compressed_attention",
        inputs=(
            Role("q", "f32", product("heads", "head_dim")),
            Role("kv", "f32", attr("head_dim")),
            _input("rows_kv", "head_dim"),
            _input("rows_gate", "head_dim"),
            _input("index_kv", "index_dim"),
            _input("index_gate", "index_dim"),
            Role("index_q", "f32", product("index_heads", "index_dim"), optional=True),
            Role("index_weights", "f32", attr("index_heads"), optional=True),
            Role("positions", "i32", lambda attrs: 1, given="positions"),
        ),
        outputs=(Role("y", "f32", product("heads", "head_dim")),),
        weights=(
            WeightRole("sinks", lambda a: (int(a["heads"]),), vector=True),
            _ape("ape", "head_dim"),
            _gamma("gamma", "head_dim"),
            _ape("index_ape", "index_dim"),
            _gamma("index_gamma", "index_dim"),
        ),
        attrs={**dict.fromkeys(("heads", "head_dim", "window"), int), "scale": float},
        extra={
            **dict.fromkeys(("ratio", "overlap", "rope_dim", *INDEX), int),
            "rope": str,
            "eps": float,
        },
        possible=_possible,
        named=_named,
        kernels=_kernels,
        states=_states,
        work=_work,
        launches=lambda attrs, load: 64,
        captured=False,
        alone=True,
        family="attention",
    ),
)
