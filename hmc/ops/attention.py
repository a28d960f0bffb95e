"""Rotary embedding, grouped-query attention and latent attention, with what their layers cache."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any, Final

from hmc.codegen.spec import KernelSpec
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
    one_kernel,
    picked,
    product,
    spec,
)

LIFTED_BYTES = 1 << 27
"""Bytes of keys and values of some heads that a GPU holds at once."""

POSITIONS = Role("positions", "i32", lambda attrs: 1, given="positions")
"""Where each token is in its sequence."""


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


@dataclass(frozen=True)
class Bounds:
    """Which positions a token sees: all up to its own; with a `window` the last so many of these;
    with a `chunk`, into which positions are divided, those of its own.
    """

    window: int = 0
    chunk: int = 0

    @staticmethod
    def of(attrs: Attrs) -> Bounds:
        """Those of a step of attention."""
        return Bounds(int(attrs.get("window", 0)), int(attrs.get("chunk", 0)))

    @property
    def reach(self) -> int:
        """The most positions that a token sees; 0: all."""
        return self.window or self.chunk

    def first(self, position: Any) -> Any:
        """The first position that a token sees, of a number or of an array of them; negative where
        a window reaches back further than there are any.
        """
        if self.chunk:
            return position // self.chunk * self.chunk
        return position - (self.window - 1) if self.window else position * 0


_GROWTH = {"growth": float, "growth_every": int, "growth_from": int}
"""Attributes of queries that grow with their position, all or none: a `Growth`."""


Growth = tuple[float, int, int] | None
"""(g, n, a): a query at position p is multiplied by 1 + g log(1 + (p + a) // n)."""


def grows(attrs: Attrs) -> Growth:
    """How queries of a step grow."""
    if "growth" not in attrs:
        return None
    return float(attrs["growth"]), int(attrs["growth_every"]), int(attrs["growth_from"])


def _grown(attrs: Attrs) -> dict[str, int]:
    """What kernels are made for."""
    return picked(attrs, *(name for name in ("growth_every", "growth_from") if name in attrs))


def _grows_or_not(attrs: Attrs) -> bool:
    given = [name in attrs for name in _GROWTH]
    return not any(given) or (all(given) and int(attrs["growth_every"]) > 0)


def _attention_possible(attrs: Attrs) -> bool:
    options = [attrs[name] for name in ("window", "chunk", "softcap") if name in attrs]
    return (
        int(attrs["heads"]) % max(1, int(attrs["kv_heads"])) == 0
        and all(options)
        and not ("window" in attrs and "chunk" in attrs)
        and _grows_or_not(attrs)
    )


def _attention(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "kv_heads", "head_dim", "v_dim") | {"block": use.block}
    append, grown = spec("kv_append", use, sizes), _grown(attrs)
    sizes |= picked(attrs, *(name for name in ("window", "chunk") if name in attrs))
    sinks = {"sinks": 1} if "sinks" in weights else {}
    cap = attrs.get("softcap")
    expr = f"{cap!r} * tanh(score / {cap!r})" if cap else ""
    if use.many:
        made = spec("attention_prefill", use, sizes | sinks | grown, out="bf16", expr=expr)
        return append, made
    return (
        append,
        spec("attention", use, sizes | grown, out="bf16", expr=expr),
        spec("attention_join", use, sizes | sinks, out="bf16"),
    )


def _attention_states(attrs: Attrs) -> tuple[State, ...]:
    heads, reach = int(attrs["kv_heads"]), Bounds.of(attrs).reach
    return (
        State("k", heads * int(attrs["head_dim"]), window=reach),
        State("v", heads * int(attrs["v_dim"]), window=reach),
    )


NO_BOUNDS = Bounds()


def attended(
    tokens: float, context: float, sequences: float = 1, bounds: Bounds = NO_BOUNDS
) -> float:
    """(query, key) pairs of causal attention: the t-th of a sequence's n = T/S new tokens sees
    context + t keys, so S * (n * context + n (n + 1) / 2); or as many of them as `bounds` allow.
    """
    own = tokens / sequences
    if bounds.reach:
        return sequences * (_seen(context + own, bounds) - _seen(context, bounds))
    return sequences * (own * context + own * (own + 1) / 2)


def _seen(positions: float, bounds: Bounds) -> float:
    """Pairs of a sequence's first tokens."""
    most = bounds.reach
    times, rest = divmod(positions, most)
    first = rest * (rest + 1) / 2
    if bounds.chunk:
        return times * most * (most + 1) / 2 + first
    return most * (most + 1) / 2 + (positions - most) * most if times else first


def _pairs_and_keys(load: Load, bounds: Bounds = NO_BOUNDS) -> tuple[float, float]:
    """Pairs that a step scores, and cache rows it reads. Of R ranks each has 1/R of the pairs,
    since zig-zag pieces are balanced, but reads the cache of all tokens.
    """
    every = load.tokens * load.ranks
    pairs = attended(every, load.context, load.sequences, bounds) / load.ranks
    context = load.context
    if bounds.reach:
        context -= max(0.0, bounds.first(context))
    return pairs, load.sequences * context + every


def gqa_flops(heads: int, head_dim: int, v_dim: int, pairs: float) -> float:
    """A score takes 2 * head_dim FLOPs a head and pair, its weighted sum of values 2 * v_dim."""
    return 2.0 * heads * (head_dim + v_dim) * pairs


def _attention_work(attrs: Attrs, load: Load) -> Work:
    pairs, keys = _pairs_and_keys(load, Bounds.of(attrs))
    heads, head_dim, v_dim = picked(attrs, "heads", "head_dim", "v_dim").values()
    return Work(1.0, load.rows, scores=gqa_flops(heads, head_dim, v_dim, pairs), keys=keys)


_PAGED_HEADS = (64, 128, 256)
_PAGED_LATENT = {"rank": 512, "rope": 64}
"""Sizes that FlashInfer's kernels of decode are made for (flashinfer/jit/attention, 0.5 to 0.7)."""


def _paged_attention(attrs: Attrs, weights: Collection[str]) -> str:
    head_dim, v_dim = picked(attrs, "head_dim", "v_dim").values()
    if head_dim != v_dim or head_dim not in _PAGED_HEADS:
        return f"heads of {head_dim} and {v_dim} columns"
    return _options(attrs, weights)


def _paged_latent(attrs: Attrs, weights: Collection[str]) -> str:
    found = picked(attrs, *_PAGED_LATENT)
    if found != _PAGED_LATENT:
        return f"latents of {found['rank']} and {found['rope']} columns"
    return _options(attrs, weights)


def _options(attrs: Attrs, weights: Collection[str]) -> str:
    """Options of attention that are not handed to it."""
    return ", ".join(sorted({*attrs, *weights} & {"chunk", "softcap", "sinks", "growth"}))


# -- latent attention ------------------------------------------------------------------------------


def _mla(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    sizes = picked(attrs, "heads", "nope", "rope", "v_dim", "rank") | {"block": use.block}
    append, stored = spec("mla_append", use, sizes), weights["kv_b"]
    if use.many:
        lifted = sizes | stored.sizes | _grown(attrs)
        return append, spec("mla_prefill", use, lifted, stored.format, "bf16")
    sizes["tokens"] = use.tokens
    expand, grown = sizes | stored.sizes, _grown(attrs)
    return (
        spec("mla_absorb", use, expand, stored.format),
        append,
        spec("mla_attention", use, sizes | grown, out="bf16"),
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
    """Keys and values of every head, in bf16, but for what all heads turn alike."""
    heads, nope, v_dim = picked(attrs, "heads", "nope", "v_dim").values()
    return 2.0 * keys * heads * (nope + v_dim)


def _mla_launches(attrs: Attrs, load: Load) -> int:
    """Appends, absorbs, attends and lifts for few queries; for many it appends, gathers latents and
    what is turned, makes terms of the former, and lifts keys and values of some heads at a time, to
    which it attends."""
    if load.few:
        return 4
    some = _lifted_bytes(attrs, _pairs_and_keys(load)[1]) / LIFTED_BYTES
    return 4 + 2 * max(1, math.ceil(some))


def kv_b_shape(attrs: Attrs) -> tuple[int, ...]:
    """Rows of every head's keys and values, a column for each element of a latent."""
    return int(attrs["heads"]) * (int(attrs["nope"]) + int(attrs["v_dim"])), int(attrs["rank"])


OPS: Final = (
    Op(
        "rotary",
        inputs=(Role("x", "f32", product("heads", "head_dim")), POSITIONS),
        outputs=(Role("x", "f32", product("heads", "head_dim"), in_place="x"),),
        weights=(
            WeightRole("gamma", lambda attrs: (int(attrs["head_dim"]),), optional=True),
            # frequencies are multiplied by its exponentials, once (Mistral Large 4)
            WeightRole("alpha", lambda a: (int(a["dim"]) // 2,), optional=True, vector=True),
        ),
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
        # heads of a token at position p times scale log(1 + p) + bias (Mistral Large 4)
        "position_scale",
        inputs=(Role("x", "f32", product("heads", "head_dim")), POSITIONS),
        outputs=(Role("x", "f32", product("heads", "head_dim"), in_place="x"),),
        weights=tuple(
            WeightRole(name, lambda attrs: (int(attrs["heads"]),), vector=True)
            for name in ("scale", "bias")
        ),
        attrs={"heads": int, "head_dim": int},
        kernels=one_kernel("position_scale", "heads", "head_dim"),
        launches=lambda attrs, load: 5,  # an operation of PyTorch each
        family="attention",
    ),
    Op(
        "attention",
        inputs=(
            Role("q", "f32", product("heads", "head_dim")),
            Role("k", "f32 bf16", product("kv_heads", "head_dim"), rows="all"),
            Role("v", "f32 bf16", product("kv_heads", "v_dim"), rows="all"),
            POSITIONS,
        ),
        outputs=(Role("y", "bf16", product("heads", "v_dim")),),
        attrs={
            **dict.fromkeys(("heads", "kv_heads", "head_dim", "v_dim"), int),
            "scale": float,
        },
        weights=(
            # scores of one more key a head, whose value is 0 (gpt-oss)
            WeightRole("sinks", lambda attrs: (int(attrs["heads"]),), optional=True, vector=True),
        ),
        extra={"window": int, "chunk": int, "softcap": float, **_GROWTH},
        possible=_attention_possible,
        kernels=_attention,
        states=_attention_states,
        work=_attention_work,
        launches=lambda attrs, load: 2 if load.few else 4,  # appends; gathers keys, values; attends
        triton=True,
        paged=_paged_attention,
        family="attention",
    ),
    Op(
        "mla",
        inputs=(
            Role("q", "f32", lambda a: int(a["heads"]) * (int(a["nope"]) + int(a["rope"]))),
            Role("latent", "f32 bf16", attr("rank"), rows="all"),
            Role("k_rope", "f32 bf16", attr("rope"), rows="all"),
            POSITIONS,
        ),
        outputs=(Role("y", "bf16", product("heads", "v_dim")),),
        weights=(WeightRole("kv_b", kv_b_shape, matmul=True),),
        attrs={
            **dict.fromkeys(("heads", "nope", "rope", "v_dim", "rank"), int),
            "scale": float,
        },
        extra=_GROWTH,
        possible=_grows_or_not,
        kernels=_mla,
        states=lambda attrs: (State("latent", int(attrs["rank"]) + int(attrs["rope"])),),
        work=_mla_work,
        launches=_mla_launches,
        triton=True,
        paged=_paged_latent,
        family="attention",
    ),
)
