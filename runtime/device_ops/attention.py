"""Attention on a device over this call's tokens and the cached past, in bounded memory; hides the
paged cache, masks and latent attention's two forms.

New rows are put into the home GPU's cache first, in bf16, and read from there; by other GPUs of a
call from the buffers, rounded likewise, so that later calls see what this one saw. A call of many
sequences, one token each, reads the cache padded to the longest, or to what its graph has room for.

This is what the CPU does where it plays a GPU: products are f32. (On GPUs they are hmc's Triton
kernels: runtime/device_ops/triton.)

What some heads read of the whole context takes a quarter of `scratch.BYTES`, what some rows or
sequences make of it another; but one head, one row and one sequence is the least. Latent attention
has the context's latents besides, 2 (rank + rope) bytes a position, on the CPU thrice as much; and
for a batch its absorbed queries and results, 2 heads (2 rank + rope) bytes a sequence.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.device_ops.shares import Call, Rows

_CACHED, _KIND = torch.bfloat16, torch.float32
"""What caches hold, and the operands of products."""
_SCORE = 4 + 4 + 4
"""Bytes of a score in `_over_latents`: in f32, as a weight in f32, and as one of the operands."""
_HIDDEN = 4 + 1 + 1
"""Bytes of an element of a mask: itself in f32, and what it is made of."""


def attention(bound: Bound, step: Step) -> Work:
    """Grouped-query attention: query head h reads key head h // (heads / kv_heads)."""
    q, k, v = (bound.tensor(step.inputs[role]) for role in ("q", "k", "v"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, kv_heads, head_dim = ints(step, "heads", "kv_heads", "head_dim")
    window = int(step.attrs.get("window", 0))
    group, v_dim = heads // kv_heads, v.shape[1] // kv_heads
    queries = q.view(len(q), kv_heads, group, head_dim)
    scale, home = float(step.attrs["scale"]), bound.home(device)
    caches = [bound.cache(step.layer, name) for name in ("k", "v")] if home else []
    kind = _KIND
    of_row = group * kind.itemsize * (head_dim + 2 * max(head_dim, v_dim))  # q and y, y in order
    padded = head_dim if v_dim < head_dim else 0  # by _attend
    of_place = (head_dim + v_dim + padded) * kind.itemsize

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        _append(call, rows, ((k,), (v,)), caches)
        longest = call.past + call.tokens if rows.reach is None else rows.reach.shape[1]
        for some in scratch.blocks(0, kv_heads, longest * of_place, scratch.quarter()):
            mine = queries[: rows.count, some]
            result = y[:, some.start * group * v_dim : some.stop * group * v_dim]
            parts = [slice(some.start * width, some.stop * width) for width in (head_dim, v_dim)]
            (one if rows.reach is None else many)(call, rows, mine, parts, result)

    def one(call: Call, rows: Rows, mine: Tensor, parts: list[slice], result: Tensor) -> None:
        number = mine.shape[1]
        keys, values = (
            seen_rows(bound, step, call, name, columns, (new[:, columns],), kind)
            for name, columns, new in zip(("k", "v"), parts, (k, v), strict=True)
        )
        keys, values = (each.view(len(each), number, -1) for each in (keys, values))
        for part, high, low in _chunks(rows, window, number * of_row, _HIDDEN):
            result[part] = _attend(
                mine[part].flatten(1, 2).to(kind), keys[low:high], values[low:high], scale, window
            )

    def many(call: Call, rows: Rows, mine: Tensor, parts: list[slice], result: Tensor) -> None:
        number = mine.shape[1]

        def some(part: slice) -> None:
            reach, hidden = _reached(rows, part, window)
            keys, values = (
                cache[:, columns][reach].view(*reach.shape, number, -1).transpose(1, 2).to(kind)
                for cache, columns in zip(caches, parts, strict=True)
            )
            mask = hidden[:, None, None].to(kind)
            found = scaled_dot_product_attention(
                mine[part].to(kind), keys, values, attn_mask=mask, scale=scale
            )
            result[part] = found.flatten(1).to(result.dtype)

        of_key = 2 * number * of_place + _HIDDEN
        for part in _batches(rows, number * of_row, of_key):
            some(part)

    return work


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: q [T, heads * (nope + rope)], cache rows [rank + rope]."""

    scale: float
    heads: int
    nope: int
    rope: int
    v_dim: int
    rank: int

    def kv_b(self, size: int) -> int:
        """Bytes of one head's part of kv_b."""
        return (self.nope + self.v_dim) * self.rank * size

    def absorbed(self, size: int) -> int:
        """Bytes of one head of one query: itself, absorbed, wide, its latents and its result."""
        return (2 * (self.nope + self.rope) + 3 * self.rank + self.v_dim) * size


def mla(bound: Bound, step: Step) -> Work:
    """Latent attention: keys and values expanded from the latents for many queries, or kv_b
    absorbed into query and result for few; whichever multiplies less.
    """
    q, latent, k_rope = (bound.tensor(step.inputs[role]) for role in ("q", "latent", "k_rope"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    widths = ints(step, "heads", "nope", "rope", "v_dim", "rank")
    sizes = Latent(float(step.attrs["scale"]), *widths)
    kv_b, home, kind = bound.matrix(step, "kv_b"), bound.home(device), _KIND
    caches = [bound.cache(step.layer, "latent")] if home else []

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        _append(call, rows, ((latent, k_rope),), caches)
        queries = q[: rows.count].view(rows.count, sizes.heads, -1)
        result = y[: rows.count].view(rows.count, sizes.heads, -1)
        if rows.reach is None:
            columns = slice(0, sizes.rank + sizes.rope)
            seen = seen_rows(bound, step, call, "latent", columns, (latent, k_rope), kind)
            _latent(rows, queries, seen, kv_b, result, sizes)
        else:
            _latent_batch(rows, queries, caches[0], kv_b, result, sizes, kind)

    return work


def _latent(
    rows: Rows, queries: Tensor, seen: Tensor, kv_b: Matrix, result: Tensor, s: Latent
) -> None:
    """One sequence: result [T, heads, v_dim] of queries [T, heads, nope + rope] over rows [S, rank
    + rope]."""
    tokens, total, size, wide = rows.count, len(seen), seen.element_size(), s.nope + s.rope
    expand = total * s.rank * (s.nope + s.v_dim) + 2 * tokens * total * wide
    absorb = tokens * s.rank * (s.nope + s.v_dim) + 2 * tokens * total * (s.rank + s.rope)
    if absorb < expand:
        some, of_head = _absorbed, s.kv_b(size) + s.absorbed(size) + _SCORE * total
    else:
        # kv_b also in another order; keys, values as wide (fused kernels want one width), and one
        # of them before it has its place
        some = _expanded
        of_head = 2 * s.kv_b(size) + total * size * (2 * wide + max(s.nope, s.v_dim))
    kind = seen.dtype
    for heads in scratch.blocks(0, s.heads, of_head, scratch.quarter()):
        some(rows, queries[:, heads], seen, _of_heads(kv_b, heads, s, kind), result[:, heads], s)


def _absorbed(
    rows: Rows, queries: Tensor, seen: Tensor, kv_b: Tensor, result: Tensor, s: Latent
) -> None:
    """As `_latent` for some heads, their keys and values never made."""
    kind, number = seen.dtype, queries.shape[1]
    into, out = kv_b[:, : s.nope], kv_b[:, s.nope :]

    def some(part: slice, high: int) -> None:
        mine = queries[part].to(kind)
        inner = torch.einsum("thn,hnr->thr", mine[..., : s.nope], into)
        mine = torch.cat((inner, mine[..., s.nope :]), -1)
        hidden = _later(high - len(mine), len(mine), high, seen.device)
        mixed = _over_latents(mine, seen[:high], hidden, s)
        result[part] = torch.einsum("thr,hvr->thv", mixed, out).to(result.dtype)

    of_row, of_score = number * s.absorbed(kind.itemsize), number * _SCORE + _HIDDEN
    for part, high, _ in _chunks(rows, 0, of_row, of_score):
        some(part, high)


def _expanded(
    rows: Rows, queries: Tensor, seen: Tensor, kv_b: Tensor, result: Tensor, s: Latent
) -> None:
    """As `_latent` for some heads, their keys and values made of all rows."""
    kind, number, total = seen.dtype, queries.shape[1], len(seen)
    into, out = kv_b[:, : s.nope], kv_b[:, s.nope :]
    wide = s.nope + s.rope
    keys = seen.new_empty(total, number, wide)
    values = seen.new_zeros(total, number, max(wide, s.v_dim))
    keys[..., : s.nope] = torch.einsum("sr,hnr->shn", seen[:, : s.rank], into)
    keys[..., s.nope :] = seen[:, None, s.rank :]
    values[..., : s.v_dim] = torch.einsum("sr,hvr->shv", seen[:, : s.rank], out)
    of_row = number * kind.itemsize * (wide + 2 * values.shape[2])
    for part, high, _ in _chunks(rows, 0, of_row, _HIDDEN):
        found = _attend(queries[part].to(kind), keys[:high], values[:high], s.scale, 0)
        result[part] = found.view(-1, number, values.shape[2])[..., : s.v_dim]
        del found


def _over_latents(wide: Tensor, seen: Tensor, hidden: Tensor, s: Latent) -> Tensor:
    """Weighted latents [T, h, rank] of queries [.., T, h, rank + rope] over rows [.., S, rank +
    rope]; `hidden` [T, S] (or [S] a sequence) is added to scores."""
    scores = (wide @ seen.transpose(-1, -2)).to(torch.float32).mul_(s.scale)
    weights = scores.add_(hidden[..., None, :]).softmax(-1).to(seen.dtype)
    return weights @ seen[..., : s.rank]


def _latent_batch(
    rows: Rows,
    queries: Tensor,
    cache: Tensor,
    kv_b: Matrix,
    result: Tensor,
    s: Latent,
    kind: torch.dtype,
) -> None:
    """Many sequences, one query each, absorbed."""
    assert rows.reach is not None
    size, longest = kind.itemsize, rows.reach.shape[1]
    of_latent = cache.shape[1] * (2 + size)
    wide = queries.new_empty((*queries.shape[:2], s.rank + s.rope), dtype=kind)
    found = torch.empty_like(wide[..., : s.rank])
    of_head = s.kv_b(size) + rows.count * s.absorbed(size)
    for heads in scratch.blocks(0, s.heads, of_head, scratch.quarter()):
        into = _of_heads(kv_b, heads, s, kind)[:, : s.nope]
        mine = queries[:, heads, : s.nope].to(kind)
        wide[:, heads, : s.rank] = torch.einsum("thn,hnr->thr", mine, into)
        del mine, into
    wide[..., s.rank :] = queries[..., s.nope :]

    def some(part: slice) -> None:
        reach, hidden = _reached(rows, part, 0)
        seen = cache[reach].to(kind)
        of_scores = len(seen) * longest * _SCORE
        for heads in scratch.blocks(0, s.heads, of_scores, scratch.quarter()):
            found[part, heads] = _over_latents(wide[part, heads], seen, hidden, s)

    for part in _batches(rows, 0, of_latent + s.heads * _SCORE + _HIDDEN):
        some(part)
    for heads in scratch.blocks(0, s.heads, of_head, scratch.quarter()):
        out = _of_heads(kv_b, heads, s, kind)[:, s.nope :]
        result[:, heads] = torch.einsum("thr,hvr->thv", found[:, heads], out).to(result.dtype)
        del out


def _of_heads(kv_b: Matrix, heads: slice, s: Latent, kind: torch.dtype) -> Tensor:
    """The rows of some heads [h, nope + v_dim, rank]: those of keys, then of values."""
    per_head = s.nope + s.v_dim
    first, last = heads.start * per_head, heads.stop * per_head
    found = kv_b.data.new_empty((last - first, s.rank), dtype=kind)
    for part in scratch.blocks(first, last, (4 + 4) * s.rank, 2 * scratch.quarter()):
        found[part.start - first : part.stop - first] = kv_b.rows(part.start, part.stop)
    return found.view(-1, per_head, s.rank)


def _append(
    call: Call, rows: Rows, new: tuple[tuple[Tensor, ...], ...], caches: list[Tensor]
) -> None:
    """Put new rows, of columns side by side, into each of the home GPU's caches (none elsewhere):
    those of the whole call where it is one sequence's, else those of the share."""
    single = rows.reach is None
    count, slots = (call.tokens, call.slots) if single else (rows.count, rows.slots)
    for cache, parts in zip(caches, new, strict=False):
        for some in scratch.blocks(0, count, (4 + 2) * cache.shape[1], scratch.quarter()):
            mine = [part[some] for part in parts]
            together = mine[0] if len(mine) == 1 else torch.cat(mine, 1)
            cache.index_copy_(0, slots[some], together.to(_CACHED))


def seen_rows(
    bound: Bound,
    step: Step,
    call: Call,
    state: str,
    columns: slice,
    new: tuple[Tensor, ...],
    kind: torch.dtype,
) -> Tensor:
    """Cache rows [past + T, width] of every position up to the call's last: `columns` of them. Away
    from the cache those of this call are `new` side by side, rounded as the cache rounds them."""
    if bound.home(bound.device(step)):
        slots = torch.cat((call.past_slots, call.slots)) if call.past else call.slots
        return bound.cache(step.layer, state)[:, columns][slots].to(kind)
    width = columns.stop - columns.start
    found = new[0].new_empty((call.past + call.tokens, width), dtype=kind)
    if call.past:
        # of GPUs in other processes only the rows are known, and not the cache
        paged = bound.link is None
        past = bound.cache(step.layer, state) if paged else bound.before(call, step.layer, state)
        for some in scratch.blocks(0, call.past, 2 * 2 * width, scratch.quarter()):
            rows = past[:, columns]
            found[some] = rows[call.past_slots[some]] if paged else rows[some]
    place = found[call.past :]
    for each in new:
        for some in scratch.blocks(0, call.tokens, 2 * each.shape[1], scratch.quarter()):
            place[some, : each.shape[1]] = each[some].to(_CACHED)
        place = place[:, each.shape[1] :]
    return found


def _chunks(
    rows: Rows, window: int, of_row: int, of_score: int
) -> Iterator[tuple[slice, int, int]]:
    """Some query rows, the position after their last, and the first position they see; as many as
    bytes for each row and for each position it may see allow."""
    for span in rows.spans:
        of_query = of_row + of_score * (span.position + span.last - span.first)
        for some in scratch.blocks(span.first, span.last, of_query, scratch.quarter()):
            start = span.position + some.start - span.first
            low = max(0, start - window + 1) if window else 0
            yield some, start + some.stop - some.start, low


def _attend(q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int) -> Tensor:
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


def _lower_right(tokens: int, total: int) -> Tensor:
    """PyTorch's mask that fused kernels know without one being made. Its module loads
    torch._dynamo, more than a second: only who attends on a device shall wait for it."""
    found: Tensor = import_module("torch.nn.attention.bias").causal_lower_right(tokens, total)
    return found


def _later(position: int, tokens: int, total: int, device: torch.device, window: int = 0) -> Tensor:
    """What is added to scores f32 [tokens, total] of queries from `position` on: 0, or -inf where a
    key is later (or earlier than the window)."""
    query = torch.arange(position, position + tokens, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    hidden = key > query
    if window:
        hidden |= key <= query - window
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def _batches(rows: Rows, of_row: int, of_place: int) -> Iterator[slice]:
    """Some sequences: as many as bytes for each and for each of its cache rows allow."""
    assert rows.reach is not None
    of_sequence = of_row + rows.reach.shape[1] * of_place
    return scratch.blocks(0, rows.count, of_sequence, scratch.quarter())


def _reached(rows: Rows, part: slice, window: int) -> tuple[Tensor, Tensor]:
    """The cache rows that some sequences see [n, longest], and what is added to their scores: 0 or
    -inf."""
    assert rows.reach is not None and rows.lengths is not None
    reach, lengths = rows.reach[part], rows.lengths[part, None]
    place = torch.arange(reach.shape[1], device=reach.device)[None]
    hidden = place >= lengths
    if window:
        hidden |= place < lengths - window
    never = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
    return reach, never
