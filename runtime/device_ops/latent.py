"""Latent attention on a device, by PyTorch, in bounded memory; hides its two forms.

What some heads make of the context takes a quarter of `scratch.BYTES`, what some rows or sequences
make of it another; but one head, one row and one sequence is the least. The context's latents are
besides, 2 (rank + rope) bytes a position, on the CPU thrice as much; and for a batch the absorbed
queries and results, 2 heads (2 rank + rope) bytes a sequence.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from hmc.ops.attention import NO_BOUNDS, Growth, grows
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.attention import Scores, attended, softmax
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.context import (
    HIDDEN,
    KIND,
    SCORE,
    append,
    chunks,
    grown,
    later,
    reached,
    seen_rows,
)
from hmc.runtime.device_ops.matmul import Matrix
from hmc.runtime.device_ops.shares import Call, Rows


@dataclass(frozen=True)
class Latent:
    """Sizes of latent attention: q [T, heads * (nope + rope)], cache rows [rank + rope]; `sinks`,
    f32 [heads], are one more score a head, whose value is 0.
    """

    scale: float
    growth: Growth
    sinks: Tensor | None
    heads: int
    nope: int
    rope: int
    v_dim: int
    rank: int

    @staticmethod
    def of(bound: Bound, step: Step) -> Latent:
        """Those of a step."""
        widths, stored = (
            ints(step, "heads", "nope", "rope", "v_dim", "rank"),
            bound.vector(step, "sinks"),
        )
        sinks = None if stored is None else stored.to(torch.float32)
        return Latent(float(step.attrs["scale"]), grows(step.attrs), sinks, *widths)

    def some(self, heads: slice) -> Latent:
        """The same of some heads, whose sinks these are."""
        return self if self.sinks is None else replace(self, sinks=self.sinks[heads])

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
    sizes, kv_b, home = Latent.of(bound, step), bound.matrix(step, "kv_b"), bound.home(device)
    caches = [bound.cache(step.layer, "latent")] if home else []

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, ((latent, k_rope),), caches)
        queries = q[: rows.count].view(rows.count, sizes.heads, -1)
        result = y[: rows.count].view(rows.count, sizes.heads, -1)
        if rows.reach is None:
            columns = slice(0, sizes.rank + sizes.rope)
            seen = seen_rows(bound, step, call, "latent", columns, (latent, k_rope), KIND)
            of_sequence(rows, queries, seen, kv_b, result, sizes)
            return

        def seen_by(part: slice) -> tuple[Tensor, Tensor]:
            reach, hidden = reached(rows, part, NO_BOUNDS)
            return caches[0][reach].to(KIND), hidden

        longest = rows.reach.shape[1]
        of_queries(rows.positions, queries, seen_by, longest, kv_b, result, sizes)

    return work


def of_sequence(
    rows: Rows, queries: Tensor, seen: Tensor, kv_b: Matrix, result: Tensor, s: Latent
) -> None:
    """One sequence: result [T, heads, v_dim] of queries [T, heads, nope + rope] over rows [S, rank
    + rope]."""
    tokens, total, size, wide = rows.count, len(seen), seen.element_size(), s.nope + s.rope
    expand = total * s.rank * (s.nope + s.v_dim) + 2 * tokens * total * wide
    absorb = tokens * s.rank * (s.nope + s.v_dim) + 2 * tokens * total * (s.rank + s.rope)
    if absorb < expand:
        some, of_head = _absorbed, s.kv_b(size) + s.absorbed(size) + SCORE * total
    else:
        # kv_b also in another order; keys, values as wide (fused kernels want one width), and one
        # of them before it has its place
        some = _expanded
        of_head = 2 * s.kv_b(size) + total * size * (2 * wide + max(s.nope, s.v_dim))
    kind = seen.dtype
    for heads in scratch.blocks(0, s.heads, of_head, scratch.quarter()):
        mine, own = queries[:, heads], _of_heads(kv_b, heads, s, kind)
        some(rows, mine, seen, own, result[:, heads], s.some(heads))


def _absorbed(
    rows: Rows, queries: Tensor, seen: Tensor, kv_b: Tensor, result: Tensor, s: Latent
) -> None:
    """As `of_sequence` for some heads, their keys and values never made."""
    kind, number = seen.dtype, queries.shape[1]
    into, out = kv_b[:, : s.nope], kv_b[:, s.nope :]

    def some(part: slice, high: int) -> None:
        mine = grown(queries[part].to(kind), rows.positions[part], s.growth)
        inner = torch.einsum("thn,hnr->thr", mine[..., : s.nope], into)
        mine = torch.cat((inner, mine[..., s.nope :]), -1)
        hidden = later(high - len(mine), len(mine), high, seen.device)
        mixed = _over_latents(mine, seen[:high], hidden, s)
        result[part] = torch.einsum("thr,hvr->thv", mixed, out).to(result.dtype)

    of_row, of_score = number * s.absorbed(kind.itemsize), number * SCORE + HIDDEN
    for part, high, _ in chunks(rows, NO_BOUNDS, of_row, of_score):
        some(part, high)


def _expanded(
    rows: Rows, queries: Tensor, seen: Tensor, kv_b: Tensor, result: Tensor, s: Latent
) -> None:
    """As `of_sequence` for some heads, their keys and values made of all rows."""
    kind, number, total = seen.dtype, queries.shape[1], len(seen)
    into, out = kv_b[:, : s.nope], kv_b[:, s.nope :]
    wide = s.nope + s.rope
    keys = seen.new_empty(total, number, wide)
    values = seen.new_zeros(total, number, max(wide, s.v_dim))
    keys[..., : s.nope] = torch.einsum("sr,hnr->shn", seen[:, : s.rank], into)
    keys[..., s.nope :] = seen[:, None, s.rank :]
    values[..., : s.v_dim] = torch.einsum("sr,hvr->shv", seen[:, : s.rank], out)
    of_row = number * kind.itemsize * (wide + 2 * values.shape[2])
    how = Scores(s.scale, NO_BOUNDS, 0.0, None if s.sinks is None else s.sinks[:, None])
    of_score = (0 if how.plain else number * SCORE) + HIDDEN
    for part, high, _ in chunks(rows, NO_BOUNDS, of_row, of_score):
        mine = grown(queries[part].to(kind), rows.positions[part], s.growth)
        found = attended(how, mine, keys[:high], values[:high])
        result[part] = found.view(-1, number, values.shape[2])[..., : s.v_dim]
        del mine, found


def _over_latents(wide: Tensor, seen: Tensor, hidden: Tensor, s: Latent) -> Tensor:
    """Weighted latents [T, h, rank] of queries [.., T, h, rank + rope] over rows [.., S, rank +
    rope]; `hidden` [T, S] (or [S] a sequence) is added to scores."""
    scores = (wide @ seen.transpose(-1, -2)).to(torch.float32).mul_(s.scale)
    scores.add_(hidden[..., None, :])
    weights = softmax(scores, None if s.sinks is None else s.sinks[:, None])
    return weights.to(seen.dtype) @ seen[..., : s.rank]


SeenBy = Callable[[slice], tuple[Tensor, Tensor]]
"""The rows that some queries see, each its own [n, S, rank + rope], and what is added to scores
[n, S]: 0, or -inf where a row is not for a query."""


def of_queries(
    positions: Tensor,
    queries: Tensor,
    seen_by: SeenBy,
    longest: int,
    kv_b: Matrix,
    result: Tensor,
    s: Latent,
) -> None:
    """Result [T, heads, v_dim] of queries [T, heads, nope + rope] that see up to `longest` rows of
    their own, absorbed.
    """
    size, count = KIND.itemsize, len(queries)
    of_latent = (s.rank + s.rope) * (2 + size)
    wide = queries.new_empty((*queries.shape[:2], s.rank + s.rope), dtype=KIND)
    found = torch.empty_like(wide[..., : s.rank])
    of_head = s.kv_b(size) + count * s.absorbed(size)
    for heads in scratch.blocks(0, s.heads, of_head, scratch.quarter()):
        into = _of_heads(kv_b, heads, s, KIND)[:, : s.nope]
        mine = queries[:, heads, : s.nope].to(KIND)
        wide[:, heads, : s.rank] = torch.einsum("thn,hnr->thr", mine, into)
        del mine, into
    wide[..., s.rank :] = queries[..., s.nope :]
    if s.growth is not None:
        wide.copy_(grown(wide, positions, s.growth))

    def some(part: slice) -> None:
        seen, hidden = seen_by(part)
        of_scores = len(seen) * longest * SCORE
        for heads in scratch.blocks(0, s.heads, of_scores, scratch.quarter()):
            found[part, heads] = _over_latents(wide[part, heads], seen, hidden, s.some(heads))

    of_query = longest * (of_latent + s.heads * SCORE + HIDDEN)
    for part in scratch.blocks(0, count, of_query, scratch.quarter()):
        some(part)
    for heads in scratch.blocks(0, s.heads, of_head, scratch.quarter()):
        out = _of_heads(kv_b, heads, s, KIND)[:, s.nope :]
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
