"""Attention on a device over this call's tokens and the cached past, in bounded memory; hides the
paged cache, masks and latent attention's two forms.

A call of one sequence reads its own tokens' keys from the buffers (all ranks' where they share the
call) and the past from the cache of the home GPU. A call of many sequences, one token each, reads
everything from the cache, padded to the longest. New rows are put into the cache first, in bf16,
and read as bf16 from the buffers too, so that later calls see what this one saw.

Products are bf16 with f32 sums on CUDA (PyTorch's fused kernels), f32 on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch.nn.functional import scaled_dot_product_attention

from hmc.plan import Step
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.shares import Call, Rows

_BYTES = 64 << 20
"""What a mask, a group of expanded heads or the padded rows of some sequences may take each."""


def attention(bound: Bound, step: Step) -> Work:
    """Grouped-query attention: query head h reads key head h // (heads / kv_heads)."""
    q, k, v = (bound.tensor(step.inputs[role]) for role in ("q", "k", "v"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, kv_heads, head_dim, window = ints(step, "heads", "kv_heads", "head_dim", "window")
    scale, home = float(step.attrs["scale"]), bound.home(device)
    caches = [bound.cache(step.layer, part) for part in (0, 1)] if home else []
    exact = q.device.type == "cpu"
    kind = torch.float32 if exact else torch.bfloat16

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        new = _appended(call, rows, (k, v), caches, home)
        queries = q[: rows.count].view(rows.count, heads, head_dim).to(kind)
        if rows.reach is None:
            keys, values = (
                _seen(bound, call, step.layer, number, part).view(
                    -1, kv_heads, part.shape[1] // kv_heads
                )
                for number, part in enumerate(new)
            )
            for first, last, high, low in _chunks(rows, window):
                y[first:last] = _attend(
                    queries[first:last],
                    keys[low:high].to(kind),
                    values[low:high].to(kind),
                    scale,
                    window,
                )
            return
        width = 2 * (caches[0].shape[1] + caches[1].shape[1])
        for part, reach, hidden in _batches(rows, width * (2 if exact else 1), window):
            keys, values = (
                cache[reach].view(*reach.shape, kv_heads, -1).transpose(1, 2).to(kind)
                for cache in caches
            )
            grouped = queries[part].view(len(reach), kv_heads, heads // kv_heads, head_dim)
            found = scaled_dot_product_attention(
                grouped, keys, values, attn_mask=hidden[:, None, None].to(kind), scale=scale
            )
            y[part] = found.flatten(1).to(y.dtype)

    return work


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: q [T, heads * (nope + rope)], cache rows [rank + rope]."""

    heads: int
    nope: int
    rope: int
    v_dim: int
    rank: int
    scale: float


def mla(bound: Bound, step: Step) -> Work:
    """Latent attention: keys and values expanded from the latents for many queries, or kv_b
    absorbed into query and result for few; whichever multiplies less.
    """
    q, latent, k_rope = (bound.tensor(step.inputs[role]) for role in ("q", "latent", "k_rope"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, nope, rope, v_dim, rank = ints(step, "heads", "nope", "rope", "v_dim", "rank")
    sizes = Latent(heads, nope, rope, v_dim, rank, float(step.attrs["scale"]))
    kv_b, home = bound.matrix(step, "kv_b"), bound.home(device)
    caches = [bound.cache(step.layer, 0)] if home else []
    kind = torch.float32 if q.device.type == "cpu" else torch.bfloat16

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        both = torch.cat([part[: call.tokens] for part in (latent, k_rope)], 1)
        count = rows.count if rows.reach is not None else call.tokens
        (new,) = _appended(call, rows, (both[:count],), caches, home)
        queries = q[: rows.count].view(rows.count, sizes.heads, -1)
        result = y[: rows.count].view(rows.count, sizes.heads, sizes.v_dim)
        if rows.reach is None:
            seen = _seen(bound, call, step.layer, 0, new).to(kind)
            _latent(rows, queries, seen, kv_b, result, sizes)
        else:
            _latent_batch(rows, queries, caches[0], kv_b, result, sizes, kind)

    return work


def _latent(
    rows: Rows,
    queries: torch.Tensor,
    seen: torch.Tensor,
    kv_b: Matrix,
    result: torch.Tensor,
    s: Latent,
) -> None:
    """One sequence: result [T, heads, v_dim] of queries [T, heads, nope + rope] over rows [S, rank
    + rope]."""
    tokens, total = rows.count, len(seen)
    expand = total * s.rank * (s.nope + s.v_dim) + 2 * tokens * total * (s.nope + s.rope)
    absorb = tokens * s.rank * (s.nope + s.v_dim) + 2 * tokens * total * (s.rank + s.rope)
    absorbed, y_kind = absorb < expand, result.dtype
    size = seen.element_size()
    per_head = tokens * (s.rank + s.rope) if absorbed else total * (s.nope + s.rope + s.v_dim)
    for heads, into, out in _head_groups(kv_b, s, max(1, _BYTES // (size * per_head)), seen.dtype):
        mine = queries[:, heads].to(seen.dtype)
        if absorbed:
            inner = torch.einsum("thn,hnr->thr", mine[..., : s.nope], into)
            wide = torch.cat((inner, mine[..., s.nope :]), -1)
            for first, last, high, _ in _chunks(rows, 0, mine.shape[1]):
                hidden = _later(high - (last - first), last - first, high, seen.device)
                mixed = _over_latents(wide[first:last], seen[:high], hidden, s)
                result[first:last, heads] = torch.einsum("thr,hvr->thv", mixed, out).to(y_kind)
            continue
        expanded = torch.einsum("sr,hnr->shn", seen[:, : s.rank], into)
        shared = seen[:, None, s.rank :].expand(-1, expanded.shape[1], -1)
        keys = torch.cat((expanded, shared), -1)
        values = torch.einsum("sr,hvr->shv", seen[:, : s.rank], out)
        for first, last, high, _ in _chunks(rows, 0):
            found = _attend(mine[first:last], keys[:high], values[:high], s.scale, 0)
            result[first:last, heads] = found.view(last - first, -1, s.v_dim).to(y_kind)


def _over_latents(
    wide: torch.Tensor, seen: torch.Tensor, hidden: torch.Tensor, s: Latent
) -> torch.Tensor:
    """Weighted latents [T, h, rank] of queries [.., T, h, rank + rope] over rows [.., S, rank +
    rope]; `hidden` [T, S] (or [S] a sequence) is added to scores."""
    scores = (wide @ seen.transpose(-1, -2)).to(torch.float32) * s.scale
    weights = (scores + hidden[..., None, :]).softmax(-1).to(seen.dtype)
    return weights @ seen[..., : s.rank]


def _latent_batch(
    rows: Rows,
    queries: torch.Tensor,
    cache: torch.Tensor,
    kv_b: Matrix,
    result: torch.Tensor,
    s: Latent,
    kind: torch.dtype,
) -> None:
    """Many sequences, one query each, absorbed."""
    inner = queries.new_empty((*queries.shape[:2], s.rank), dtype=kind)
    found = torch.empty_like(inner)
    group = max(1, _BYTES // (8 * s.rank * (s.nope + s.v_dim)))
    for heads, into, _ in _head_groups(kv_b, s, group, kind):
        mine = queries[:, heads, : s.nope].to(kind)
        inner[:, heads] = torch.einsum("thn,hnr->thr", mine, into)
    wide = torch.cat((inner, queries[..., s.nope :].to(kind)), -1)
    for part, reach, hidden in _batches(rows, 4 * cache.shape[1], 0):
        found[part] = _over_latents(wide[part], cache[reach].to(kind), hidden, s)
    for heads, _, out in _head_groups(kv_b, s, group, kind):
        mixed = torch.einsum("thr,hvr->thv", found[:, heads], out)
        result[:, heads] = mixed.to(result.dtype)


def _head_groups(
    kv_b: Matrix, s: Latent, group: int, kind: torch.dtype
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Heads, their key rows [h, nope, rank] and value rows [h, v_dim, rank], some at a time."""
    per_head = s.nope + s.v_dim
    for first in range(0, s.heads, group):
        last = min(s.heads, first + group)
        weight = kv_b.rows(first * per_head, last * per_head).view(-1, per_head, s.rank).to(kind)
        yield slice(first, last), weight[:, : s.nope], weight[:, s.nope :]


def _appended(
    call: Call,
    rows: Rows,
    parts: tuple[torch.Tensor, ...],
    caches: list[torch.Tensor],
    home: bool,
) -> list[torch.Tensor]:
    """The new cache rows in bf16, put into the home GPU's cache: those of the whole call where it
    is one sequence's, else those of the share."""
    count = rows.count if rows.reach is not None else call.tokens
    new = [part[:count].to(torch.bfloat16) for part in parts]
    if home:
        slots = rows.slots if rows.reach is not None else call.slots
        for values, cache in zip(new, caches, strict=True):
            cache.index_copy_(0, slots, values)
    return new


def _seen(bound: Bound, call: Call, layer: int, part: int, new: torch.Tensor) -> torch.Tensor:
    """Cache rows of every position up to the call's last."""
    if not call.past:
        return new
    return torch.cat((bound.before(call, layer, part).to(new.device), new))


def _chunks(rows: Rows, window: int, heads: int = 1) -> Iterator[tuple[int, int, int, int]]:
    """Query rows [first, last), the position after their last, and the first position they see;
    such that a mask (or the scores of `heads`) stays small."""
    for span in rows.spans:
        step = max(1, _BYTES // (4 * heads * (span.position + span.last - span.first)))
        for first in range(span.first, span.last, step):
            last = min(span.last, first + step)
            start = span.position + first - span.first
            low = max(0, start - window + 1) if window else 0
            yield first, last, start + last - first, low


def _attend(
    q: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, scale: float, window: int
) -> torch.Tensor:
    """Causal attention [T, heads * v] of q [T, heads, d], the last T of the positions of keys [S,
    kv_heads, d] and values [S, kv_heads, v]."""
    tokens, total, group = len(q), len(keys), q.shape[1] // keys.shape[1]
    v_dim = values.shape[2]
    mask = _lower_right(tokens, total)
    if window:
        mask = _later(total - tokens, tokens, total, q.device, window).to(q.dtype)
    if (missing := q.shape[2] - v_dim) > 0:  # fused kernels want one width
        values = torch.nn.functional.pad(values, (0, missing))
    found = scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        keys.transpose(0, 1)[None],
        values.transpose(0, 1)[None],
        attn_mask=mask,
        scale=scale,
        enable_gqa=group > 1,
    )
    return found[0, ..., :v_dim].transpose(0, 1).flatten(1)


def _lower_right(tokens: int, total: int) -> torch.Tensor:
    """PyTorch's mask that fused kernels know without one being made. Its module loads
    torch._dynamo, more than a second: only who attends on a device shall wait for it."""
    found: torch.Tensor = import_module("torch.nn.attention.bias").causal_lower_right(tokens, total)
    return found


def _later(
    position: int, tokens: int, total: int, device: torch.device, window: int = 0
) -> torch.Tensor:
    """What is added to scores f32 [tokens, total] of queries from `position` on: 0, or -inf where a
    key is later (or earlier than the window)."""
    query = torch.arange(position, position + tokens, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def _batches(
    rows: Rows, width: int, window: int
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Sequences, the cache rows each sees [n, longest], and what is added to their scores: 0 or
    -inf; such that rows of `width` bytes stay within bounds."""
    assert rows.reach is not None and rows.lengths is not None
    longest = rows.reach.shape[1]
    place = torch.arange(longest, device=rows.reach.device)[None]
    step = max(1, _BYTES // (longest * width))
    for first in range(0, rows.count, step):
        part = slice(first, min(rows.count, first + step))
        lengths = rows.lengths[part, None]
        hidden = place >= lengths
        if window:
            hidden |= place < lengths - window
        never = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
        yield part, rows.reach[part], never
