"""Rotary embedding, grouped-query attention and latent attention, with what their layers cache."""

from __future__ import annotations

import math
from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.errors import UnsupportedError
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

LIFTED_BYTES = 1 << 26
"""Bytes of keys and values of some heads that a GPU holds at once."""

_POSITIONS = Role("positions", "i32", lambda attrs: 1, given="positions")


# -- rotary ----------------------------------------------------------------------------------------


def _rotary(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "head_dim", "start", "dim", "interleaved")
    gamma = weights["gamma"].format if "gamma" in weights else ""
    return (spec("rotary", use, sizes, gamma),)


def _slice(attrs: Attrs) -> bool:
    """Pairs of each head are turned, those of the slice."""
    start, dim, head_dim = picked(attrs, "start", "dim", "head_dim").values()
    return dim > 0 and dim % 2 == 0 and start + dim <= head_dim and int(attrs["interleaved"]) < 2


# -- grouped-query attention -----------------------------------------------------------------------


def _attention(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    if attrs.get("window"):
        raise UnsupportedError(
            f"attention with a window of {attrs['window']} tokens: the CPU's kernels of prefill"
            " have none yet"
        )
    sizes = picked(attrs, "heads", "kv_heads", "head_dim", "v_dim") | {"block": use.block}
    append = spec("kv_append", use, sizes)
    if use.many:
        return append, spec("attention_prefill", use, sizes, out="bf16")
    return (
        append,
        spec("attention", use, sizes, out="bf16"),
        spec("attention_join", use, sizes, out="bf16"),
    )


def _attention_states(attrs: Attrs) -> tuple[State, ...]:
    heads, window = int(attrs["kv_heads"]), int(attrs.get("window", 0))
    return (
        State("k", heads * int(attrs["head_dim"]), window=window),
        State("v", heads * int(attrs["v_dim"]), window=window),
    )


def attended(tokens: float, context: float, sequences: float = 1) -> float:
    """(query, key) pairs of causal attention: the t-th of a sequence's n = T/S new tokens sees
    context + t keys, so S * (n * context + n (n + 1) / 2).
    """
    own = tokens / sequences
    return sequences * (own * context + own * (own + 1) / 2)


def _pairs_and_keys(load: Load) -> tuple[float, float]:
    """Pairs that a step scores, and cache rows it reads. Of R ranks each has 1/R of the pairs,
    since zig-zag pieces are balanced, but reads the cache of all tokens.
    """
    every = load.tokens * load.ranks
    pairs = attended(every, load.context, load.sequences) / load.ranks
    return pairs, load.sequences * load.context + every


def gqa_flops(heads: int, head_dim: int, v_dim: int, pairs: float) -> float:
    """A score takes 2 * head_dim FLOPs a head and pair, its weighted sum of values 2 * v_dim."""
    return 2.0 * heads * (head_dim + v_dim) * pairs


def _attention_work(attrs: Attrs, load: Load) -> Work:
    pairs, keys = _pairs_and_keys(load)
    heads, head_dim, v_dim = picked(attrs, "heads", "head_dim", "v_dim").values()
    return Work(1.0, load.rows, scores=gqa_flops(heads, head_dim, v_dim, pairs), keys=keys)


# -- latent attention ------------------------------------------------------------------------------


def _mla(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "nope", "rope", "v_dim", "rank") | {"block": use.block}
    append, stored = spec("mla_append", use, sizes), weights["kv_b"]
    if use.many:
        lifted = sizes | stored.sizes
        return append, spec("mla_prefill", use, lifted, stored.format, "bf16")
    sizes["tokens"] = use.tokens
    expand = sizes | stored.sizes
    return (
        spec("mla_absorb", use, expand, stored.format),
        append,
        spec("mla_attention", use, sizes, out="bf16"),
        spec("mla_attention_join", use, sizes, out="bf16"),
        spec("mla_up", use, expand, stored.format, "bf16"),
    )


def mla_lifted_flops(attrs: Attrs, pairs: float, tokens: float, keys: float) -> float:
    """Latent attention with keys and values of every head (DeepSeek-V3, arXiv 2412.19437, eq.
    1-11): scores over nope + rope, sums over v_dim, and every key's latent lifted once through
    kv_b: 2 rank (nope + v_dim) a head and key, where the T new ones are counted with the step's
    weights already.
    """
    heads, nope, rope, v_dim, rank = picked(
        attrs, "heads", "nope", "rope", "v_dim", "rank"
    ).values()
    lifted = 2.0 * heads * rank * (nope + v_dim) * max(0.0, keys - tokens)
    return 2.0 * heads * (nope + rope + v_dim) * pairs + lifted


def mla_flops(attrs: Attrs, pairs: float, tokens: float, keys: float) -> float:
    """Latent attention in the cheaper of its two forms: lifted, or absorbed, where kv_b is moved to
    the query and the result, so that scores run over rank + rope and sums over rank.
    """
    heads, rope, rank = picked(attrs, "heads", "rope", "rank").values()
    absorbed = 2.0 * heads * (2 * rank + rope) * pairs
    return min(mla_lifted_flops(attrs, pairs, tokens, keys), absorbed)


def _mla_work(attrs: Attrs, load: Load) -> Work:
    pairs, keys = _pairs_and_keys(load)
    flops = mla_lifted_flops if load.lifted else mla_flops
    scores = flops(attrs, pairs, load.tokens, keys)
    made = 0.0 if load.few else 2.0 * _lifted_bytes(attrs, keys)
    return Work(1.0, load.rows, scores=scores, keys=keys, made=made)


def _lifted_bytes(attrs: Attrs, keys: float) -> float:
    """Keys and values of every head, in bf16."""
    heads, nope, rope, v_dim = picked(attrs, "heads", "nope", "rope", "v_dim").values()
    return 2.0 * keys * heads * (nope + rope + v_dim)


def _mla_launches(attrs: Attrs, load: Load) -> int:
    """Appends, absorbs, attends and lifts for few queries; for many it appends and gathers, and
    lifts keys and values of some heads at a time, to which it attends."""
    if load.few:
        return 4
    some = _lifted_bytes(attrs, _pairs_and_keys(load)[1]) / LIFTED_BYTES
    return 2 + 4 * max(1, math.ceil(some))


def _mla_shape(attrs: Attrs) -> tuple[int, ...]:
    return int(attrs["heads"]) * (int(attrs["nope"]) + int(attrs["v_dim"])), int(attrs["rank"])


OPS: Final = (
    Op(
        "rotary",
        inputs=(Role("x", "f32", product("heads", "head_dim")), _POSITIONS),
        outputs=(Role("x", "f32", product("heads", "head_dim"), in_place="x"),),
        weights=(WeightRole("gamma", lambda attrs: (int(attrs["head_dim"]),), optional=True),),
        attrs={
            **dict.fromkeys(("heads", "head_dim", "start", "dim", "interleaved"), int),
            "rope": str,  # the name of a constant: dim / 2 inverse frequencies
            "factor": float,
            "eps": float,
        },
        possible=_slice,
        kernels=_rotary,
        triton=True,
        family="attention",
    ),
    Op(
        "attention",
        inputs=(
            Role("q", "f32", product("heads", "head_dim")),
            Role("k", "f32 bf16", product("kv_heads", "head_dim"), rows="all"),
            Role("v", "f32 bf16", product("kv_heads", "v_dim"), rows="all"),
            _POSITIONS,
        ),
        outputs=(Role("y", "bf16", product("heads", "v_dim")),),
        attrs={
            **dict.fromkeys(("heads", "kv_heads", "head_dim", "v_dim"), int),
            "scale": float,
        },
        extra={"window": int},
        possible=lambda attrs: int(attrs["heads"]) % max(1, int(attrs["kv_heads"])) == 0,
        kernels=_attention,
        states=_attention_states,
        work=_attention_work,
        launches=lambda attrs, load: 2 if load.few else 4,  # appends; gathers keys, values; attends
        triton=True,
        family="attention",
    ),
    Op(
        "mla",
        inputs=(
            Role("q", "f32", lambda a: int(a["heads"]) * (int(a["nope"]) + int(a["rope"]))),
            Role("latent", "f32 bf16", attr("rank"), rows="all"),
            Role("k_rope", "f32 bf16", attr("rope"), rows="all"),
            _POSITIONS,
        ),
        outputs=(Role("y", "bf16", product("heads", "v_dim")),),
        weights=(WeightRole("kv_b", _mla_shape, matmul=True),),
        attrs={
            **dict.fromkeys(("heads", "nope", "rope", "v_dim", "rank"), int),
            "scale": float,
        },
        kernels=_mla,
        states=lambda attrs: (State("latent", int(attrs["rank"]) + int(attrs["rope"])),),
        work=_mla_work,
        launches=_mla_launches,
        triton=True,
        family="attention",
    ),
)
