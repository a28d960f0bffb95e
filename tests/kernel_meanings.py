"""What kernels mean, in numpy, by their names: all that they are compared with."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hmc.codegen.expr import Expr, evaluate, parse
from hmc.codegen.isa import TIERS
from hmc.codegen.kernels.probes.peak import dot_peak_flops
from hmc.codegen.kernels.routing.route import (
    SIGMOID,
    SIGMOID_CHOSEN,
    SOFTMAX,
    SOFTMAX_CHOSEN,
    SPARSEMIXER,
    SQRT_SOFTPLUS,
)
from hmc.codegen.rowwise import Rowwise
from hmc.codegen.spec import KernelSpec

Array = NDArray[Any]


def linear(
    x: np.ndarray, w: np.ndarray, bias: np.ndarray | None = None, gather: np.ndarray | None = None
) -> np.ndarray:
    """Reference, all f64: x [T, K] (rows picked by `gather`), w [N, K] scaled; y [tokens, N]."""
    picked = x if gather is None else x[gather]
    y: np.ndarray = picked @ w.T
    return y if bias is None else y + bias


def gate_up(
    x: np.ndarray,
    gate: np.ndarray,
    up: np.ndarray,
    expr: str,
    biases: Sequence[np.ndarray | None] = (None, None),
) -> np.ndarray:
    """Reference, all f64: x [T, K], gate and up [N, K] scaled, their biases [N]; y [T, N]."""
    one, two = (linear(x, w, bias) for w, bias in zip((gate, up), biases, strict=True))
    return evaluated(parse(expr), {"gate": one, "up": two})


def experts_gate_up(
    x: np.ndarray,
    ids: np.ndarray,
    gate: list[np.ndarray],
    up: list[np.ndarray],
    expr: str,
    biases: Sequence[np.ndarray] = (),
    routing: np.ndarray | None = None,
) -> np.ndarray:
    """Reference, all f64: x [T, K], ids [T, J], gate and up: [N, K] for each expert; act [T * J,
    N], zero for negative ids. `biases` of gate and up [experts, N]; `routing` [T, J] is the weight.
    """
    act = np.zeros((ids.size, len(gate[0])))
    for pair, expert in enumerate(ids.reshape(-1)):
        if expert >= 0:
            row = x[pair // ids.shape[1]]
            found = {"gate": gate[expert] @ row, "up": up[expert] @ row}
            for name, bias in zip(found, biases, strict=False):
                found[name] = found[name] + bias[expert]
            if routing is not None:
                found["weight"] = np.full(len(act[pair]), routing.reshape(-1)[pair])
            act[pair] = evaluated(parse(expr), found)
    return act


def experts_down(
    act: np.ndarray,
    ids: np.ndarray,
    routing: np.ndarray,
    down: list[np.ndarray],
    bias: np.ndarray | None = None,
) -> np.ndarray:
    """Reference, all f64: act [T * J, K], routing [T, J], down: [N, K] for each expert; y [T, N],
    summed over the J whose ids are not negative.
    """
    y = np.zeros((len(ids), len(down[0])))
    for pair, expert in enumerate(ids.reshape(-1)):
        if expert >= 0:
            product = down[expert] @ act[pair]
            product = product if bias is None else product + bias[expert]
            y[pair // ids.shape[1]] += routing.reshape(-1)[pair] * product
    return y


def sort_experts(ids: np.ndarray, experts: int) -> tuple[np.ndarray, np.ndarray]:
    """Reference: ids [T, J]; slots (as many as are not negative) and offsets [experts + 1]."""
    flat = ids.reshape(-1)
    here = np.flatnonzero(flat >= 0)
    slots = here[np.argsort(flat[here], kind="stable")]
    return slots, np.concatenate([[0], np.cumsum(np.bincount(flat[here], minlength=experts))])


def resident_ids(ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Reference: ids i32 [T, J], mask [experts]; i32 [T, J]."""
    return np.where(mask[ids] != 0, ids, -1).astype(np.int32)


def route(
    logits: Array,
    bias: Array | None,
    *,
    top_k: int,
    scoring: int,
    normalise: bool,
    factor: float,
    groups: int = 0,
    top_groups: int = 0,
    group_best: int = 2,
    eps: float = 1e-20,
    jitter: float = 0.0,
    scale: Array | None = None,
) -> tuple[Array, Array]:
    """(ids, weights) [tokens, top_k] in float64, for finite logits [tokens, experts]."""
    x = logits.astype(np.float64)
    tokens, experts = x.shape
    if scoring == SOFTMAX:
        score = np.exp(x - x.max(axis=1, keepdims=True))
        score /= score.sum(axis=1, keepdims=True)
    else:
        score = 1 / (1 + np.exp(-x)) if scoring == SIGMOID else x
    if scoring == SQRT_SOFTPLUS:
        score = np.sqrt(np.logaddexp(0, x))
    choice = score if bias is None else score + bias
    if top_groups:
        per = choice.reshape(tokens, groups, -1)
        worth = np.sort(per, axis=2)[:, :, -group_best:].sum(axis=2)
        keep = np.argsort(-worth, axis=1, kind="stable")[:, :top_groups]
        kept = np.zeros((tokens, groups), bool)
        np.put_along_axis(kept, keep, True, axis=1)
        choice = np.where(np.repeat(kept, experts // groups, axis=1), choice, -np.inf)
    ids = np.argsort(-choice, axis=1, kind="stable")[:, :top_k]
    weights = np.take_along_axis(score, ids, axis=1)
    if scoring == SOFTMAX_CHOSEN:
        weights = np.exp(weights - weights.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
    elif scoring == SIGMOID_CHOSEN:
        weights = 1 / (1 + np.exp(-weights))
    elif scoring == SPARSEMIXER:
        left = x.copy()
        for slot in range(top_k):
            best = left.max(axis=1, keepdims=True)
            near = best - left <= 2 * jitter * np.maximum(np.abs(x), best)
            shares = np.where(near, np.exp(left - best), 0)
            own = np.take_along_axis(left, ids[:, slot : slot + 1], axis=1)
            weights[:, slot] = (np.exp(own - best) / shares.sum(axis=1, keepdims=True))[:, 0]
            np.put_along_axis(left, ids[:, slot : slot + 1], -np.inf, axis=1)
    if normalise:
        weights = weights / (weights.sum(axis=1, keepdims=True) + eps)
    weights = weights * factor
    return ids, weights if scale is None else weights * scale.astype(np.float64)[ids]


def kv_append(cache: Array, rows: Array, blocks: Array, slots: Array) -> Array:
    """cache [blocks, kv_heads, block, dim] with rows [tokens, kv_heads, dim] at (block, slot) of
    each token.
    """
    result = cache.copy()
    for row, number, slot in zip(rows, blocks, slots, strict=True):
        result[number, :, slot] = row
    return result


@dataclass(frozen=True)
class Options:
    """What some models ask of attention besides: codegen/arguments.py says what each means."""

    window: int = 0
    chunk: int = 0
    softcap: float = 0.0
    sinks: Array | None = None
    growth: float = 0.0
    growth_every: int = 0
    growth_from: int = 0

    def first(self, position: int) -> int:
        """The first position that a token at `position` sees."""
        if self.chunk:
            return position // self.chunk * self.chunk
        return max(0, position + 1 - self.window) if self.window else 0

    def factor(self, position: int) -> float:
        """What its query is multiplied by."""
        if not self.growth_every:
            return 1.0
        steps = (position + self.growth_from) // self.growth_every
        return 1.0 + self.growth * math.log(1 + steps)


NO_OPTIONS = Options()


def attention(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    tables: Array,
    sequence: Array,
    positions: Array,
    scale: float,
    options: Options = NO_OPTIONS,
) -> Array:
    """Attention of q [tokens, heads, head_dim] in float64: [tokens, heads, v_dim]."""
    tokens, heads, _ = q.shape
    _, kv_heads, block, v_dim = v_cache.shape
    y = np.zeros((tokens, heads, v_dim))
    for t in range(tokens):
        position = int(positions[t])
        if position < 0:
            continue
        where = np.arange(options.first(position), position + 1)
        numbers = tables[sequence[t]][where // block]
        for h in range(heads):
            g = h // (heads // kv_heads)
            keys = k_cache[numbers, g, where % block].astype(np.float64)
            values = v_cache[numbers, g, where % block].astype(np.float64)
            score = keys @ q[t, h].astype(np.float64) * scale * options.factor(position)
            if options.softcap:
                score = options.softcap * np.tanh(score / options.softcap)
            others = [] if options.sinks is None else [float(options.sinks[h])]
            every = np.exp(np.array([*score, *others]) - max([*score, *others]))
            y[t, h] = every[: len(where)] @ values / every.sum()
    return y


def mla_attention(
    q: Array,
    q_latent: Array,
    cache: Array,
    tables: Array,
    sequence: Array,
    positions: Array,
    scale: float,
    options: Options = NO_OPTIONS,
) -> Array:
    """Weighted latents [tokens, heads, rank] in float64; q [tokens, heads, nope + rope]."""
    rank = q_latent.shape[2]
    query = np.concatenate([q_latent, q[..., q.shape[2] + rank - cache.shape[2] :]], axis=2)
    rows = cache[:, None]
    return attention(query, rows, rows[..., :rank], tables, sequence, positions, scale, options)


def mla_up(y_latent: Array, w: Array, nope: int) -> Array:
    """y [tokens, heads, v_dim] in float64; w [heads, nope + v_dim, rank] (scales applied)."""
    result: Array = np.einsum("thr,hvr->thv", y_latent.astype(np.float64), w[:, nope:])
    return result


def mla_absorb(q: Array, w: Array, nope: int) -> Array:
    """q_latent [tokens, heads, rank] in float64; q [tokens, heads, nope + rope], w [heads, nope +
    v_dim, rank].
    """
    result: Array = np.einsum("thd,hdr->thr", q[..., :nope].astype(np.float64), w[:, :nope])
    return result


def attention_prefill(
    q: Array,
    k_cache: Array,
    v_cache: Array,
    table: Array,
    past: int,
    scale: float,
    options: Options = NO_OPTIONS,
) -> Array:
    """Reference in f64: q [tokens, heads, head_dim] at positions past, past + 1, ...; caches
    [blocks, kv_heads, block, dim]; table [n] the sequence's blocks. Result [tokens, heads, v_dim].
    """
    tokens = len(q)
    sequence, positions = np.zeros(tokens, np.int32), np.arange(past, past + tokens)
    return attention(q, k_cache, v_cache, table[None], sequence, positions, scale, options)


def mla_prefill(
    q: Array,
    cache: Array,
    w: Array,
    table: Array,
    past: int,
    scale: float,
    rope: int,
    options: Options = NO_OPTIONS,
) -> Array:
    """Reference in f64: q [tokens, heads, nope + rope] at positions past, past + 1, ...; cache
    [blocks, block, rank + rope]; w [heads, nope + v_dim, rank] (scales applied); table [n] the
    sequence's blocks. Result [tokens, heads, v_dim].
    """
    heads, nope = w.shape[0], q.shape[2] - rope
    rows = cache.astype(np.float64)
    lifted = np.einsum("nbr,hdr->nhbd", rows[..., : w.shape[2]], w)
    shared = np.repeat(rows[:, None, :, w.shape[2] :], heads, 1)
    keys = np.concatenate([lifted[..., :nope], shared], -1)
    return attention_prefill(q, keys, lifted[..., nope:], table, past, scale, options)


def index_scores(q: Array, weights: Array, keys: Array) -> Array:
    """Scores [S] of one token in float64: q [heads, dim], weights [heads], keys [S, dim]."""
    products = q.astype(np.float64) @ keys.astype(np.float64).T
    result: Array = weights.astype(np.float64) @ np.maximum(products, 0)
    return result


def index_choose(scores: Array, most: int) -> Array:
    """The places of the `most` best of scores [S], of equal ones the first, then -1."""
    best = np.sort(np.argsort(-scores, kind="stable")[:most])
    return np.pad(best, (0, most - len(best)), constant_values=-1)


def mla_gather(cache: Array, table: Array, chosen: Array, last: int) -> Array:
    """Rows [n, width] of a token at position `last` for those of `chosen` [K] that it sees."""
    at = np.where((chosen >= 0) & (chosen <= last), chosen, last)[: last + 1]
    block = cache.shape[1]
    return cache[table[at // block], at % block]


def rows(table: Array, picks: Array) -> Array:
    """table[picks] in float64."""
    result: Array = table[picks].astype(np.float64)
    return result


def norm(x: Array, gamma: Array, eps: float) -> Array:
    """x [..., width] normalised over its last axis, in float64."""
    wide = x.astype(np.float64)
    mean = np.mean(wide * wide, axis=-1, keepdims=True)
    result: Array = wide / np.sqrt(mean + eps) * gamma.astype(np.float64)
    return result


def add(h: Array, *terms: Array) -> Array:
    """h + each of `terms`, in float64."""
    total: Array = h.astype(np.float64)
    for term in terms:
        total = total + term
    return total


def add_norm(gamma: Array, eps: float, h: Array, *terms: Array) -> tuple[Array, Array]:
    """(h_out, y) of `add_norm`, in float64."""
    total = add(h, *terms)
    return total, norm(total, gamma, eps)


def rotary(
    x: Array,
    gamma: Array | None,
    cos: Array,
    sin: Array,
    positions: Array,
    *,
    start: int,
    dim: int,
    interleaved: bool,
    eps: float,
) -> Array:
    """x [tokens, heads, head_dim] after the optional norm and the rotation, in float64."""
    y: Array = x.astype(np.float64)
    if gamma is not None:
        y = y / np.sqrt(np.mean(y * y, axis=-1, keepdims=True) + eps) * gamma.astype(np.float64)
    c, s = (t.astype(np.float64)[positions][:, None, :] for t in (cos, sin))
    first, second = (
        (slice(start, start + dim, 2), slice(start + 1, start + dim, 2))
        if interleaved
        else (slice(start, start + dim // 2), slice(start + dim // 2, start + dim))
    )
    a, b = y[..., first].copy(), y[..., second].copy()
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y


def _normal(x: Array) -> Array:
    """The normal distribution's share below x."""
    share = np.vectorize(lambda one: math.erfc(-one * math.sqrt(0.5)) / 2, [np.float64])
    result: Array = share(x)
    return result


def _sigmoid(x: Array) -> Array:
    result: Array = np.exp(-np.logaddexp(0, -x))
    return result


NUMPY: Mapping[str, Callable[..., Array]] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "neg": np.negative,
    "less": np.less,
    "less_equal": np.less_equal,
    "where": np.where,
    "minimum": np.minimum,
    "maximum": np.maximum,
    "relu": lambda x: np.maximum(x, 0),
    "square": np.square,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "exp": np.exp,
    "sigmoid": _sigmoid,
    "silu": lambda x: x * _sigmoid(x),
    "tanh": np.tanh,
    "softplus": lambda x: np.logaddexp(0, x),
    "gelu": lambda x: x * _normal(x),
    "gelu_tanh": lambda x: x * _sigmoid(math.sqrt(8 / math.pi) * (x + 0.044715 * x**3)),
    "sum": lambda x: np.sum(x, axis=-1, keepdims=True),
    "mean": lambda x: np.mean(x, axis=-1, keepdims=True),
}


def evaluated(tree: Expr, operands: Mapping[str, Array]) -> Array:
    """`tree` of arrays that broadcast; sums are over the last axis."""
    return evaluate(tree, operands.__getitem__, NUMPY, np.asarray)


def pointwise(form: Rowwise, operands: Mapping[str, Array]) -> Array:
    """Reference in float64: inputs [T, columns], vectors [columns] -> [T, columns]."""
    shaped = {name: form.by_group(name, each.astype(np.float64)) for name, each in operands.items()}
    result = evaluated(form.tree, shaped)
    return result.reshape(len(result), -1)


def nan_codes(spans: Sequence[np.ndarray]) -> np.ndarray:
    """Reference: uint8 arrays of codes; i64 [spans]."""
    return np.array([(codes & 0x7F == 0x7F).any() for codes in spans], np.int64)


def dot_peak(spec: KernelSpec, rounds: int, worker: int) -> float:
    """Reference of `dot_peak`: the worker's sink, exact while sums stay below 2^24 / 64."""
    seed = float(worker % 8 + 1)
    tier = TIERS[spec.isa]
    lanes, chains = tier.lanes, tier.registers * 3 // 4
    unrolled = dot_peak_flops(spec) // (chains * lanes * (4 if tier.pair_dot else 2))
    # The bf16 halves of an f32 with a short mantissa are (0, value): one product a pair.
    each = rounds * unrolled * seed * (seed / -64.0)
    return lanes * (chains * (chains - 1) / 2 + chains * each)


def stream_read(data: np.ndarray) -> int:
    """Reference of `stream_read` on uint8 data: xor over all workers' sinks, as int64."""
    padded = np.zeros(-(-data.size // 8) * 8, np.uint8)
    padded[: data.size] = data
    return int(np.bitwise_xor.reduce(padded.view(np.int64), initial=0))


def stream_fill(size: int, value: int) -> np.ndarray:
    """Reference of `stream_fill`: int64 [size / 8]."""
    return np.full(size // 8, value, np.int64)


def flag_reached(word: int, epoch: int) -> bool:
    """Reference of what `flag_wait` waits for: `word` is `epoch` or later, modulo 2^32."""
    return bool(np.int32(np.uint32((word - epoch) & 0xFFFFFFFF)) >= 0)
