"""Sparse latent attention on a device, by PyTorch, in bounded memory: the indexer's choice, and
attention to what it chose.

Scores of some queries take a quarter of `scratch.BYTES`, the rows that some queries read another,
and what is absorbed of some a third; but one query is the least. Indexer keys of one sequence are
besides, 4 dim bytes a position. Prompts whose tokens all see no more than can be chosen are
attended to as `mla` does. Nothing asks the device for a value.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hmc.blocks.sparse import best, index_scores
from hmc.ops import kept_by
from hmc.ops.attention import NO_BOUNDS
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.context import CACHED, KIND, append, later, reached, seen_rows
from hmc.runtime.device_ops.latent import Latent, of_queries, of_sequence
from hmc.runtime.device_ops.shares import Call

_PLACE = 8 + 8 + 4
"""Bytes of a score in order: its place, twice, and itself."""


def index(bound: Bound, step: Step) -> Work:
    """The positions that each token attends to."""
    q, new, weights = (bound.tensor(step.inputs[role]) for role in ("q", "indexer_k", "weights"))
    chosen, share = bound.tensor(step.outputs["chosen"]), bound.share(step)
    device, (heads, dim, most) = bound.device(step), ints(step, "heads", "dim", "index_topk")
    caches = [bound.cache(step.layer, "indexer_k")] if bound.home(device) else []
    every = slice(0, dim)

    def some(part: slice, keys: Tensor, hidden: Tensor, seen: Tensor) -> None:
        queries = q[part].to(CACHED).to(KIND).view(-1, heads, dim)  # as the host's kernels do
        if keys.ndim == 3:  # of each query its own
            scores = index_scores(queries[:, None], keys, weights[part, None].to(KIND))[:, 0]
        else:
            scores = index_scores(queries, keys, weights[part].to(KIND))
        chosen[part] = best(scores + hidden, seen, most)

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, ((new,),), caches)
        if rows.reach is not None:
            longest = rows.reach.shape[1]
            for part in scratch.blocks(
                0, rows.count, longest * _row(heads, dim), scratch.quarter()
            ):
                reach, hidden = reached(rows, part, NO_BOUNDS)
                some(part, caches[0][reach].to(KIND), hidden, rows.positions[part] + 1)
            return
        keys = seen_rows(bound, step, call, "indexer_k", every, (new,), KIND)
        for span in rows.spans:
            if span.position + span.last - span.first <= most:
                _all(chosen[span.first : span.last], span.position)
                continue
            size = len(keys) * _row(heads, 0)
            for part in scratch.blocks(span.first, span.last, size, scratch.quarter()):
                start, count = span.position + part.start - span.first, part.stop - part.start
                high = start + count
                hidden = later(start, count, high, keys.device)
                some(part, keys[:high], hidden, rows.positions[part] + 1)

    return work


def _row(heads: int, dim: int) -> int:
    """Bytes that a query takes a position: products, twice, its score, and its key."""
    return KIND.itemsize * (2 * heads + dim) + 2 * dim + _PLACE


def _all(chosen: Tensor, position: int) -> None:
    """All positions of tokens from `position` on."""
    place = torch.arange(chosen.shape[1], dtype=chosen.dtype, device=chosen.device)[None]
    last = torch.arange(position, position + len(chosen), device=chosen.device)[:, None]
    chosen.copy_(place.masked_fill(place > last, -1))


def sparse_mla(bound: Bound, step: Step) -> Work:
    """Latent attention to the positions of `chosen`, absorbed."""
    q, chosen = (bound.tensor(step.inputs[role]) for role in ("q", "chosen"))
    new = tuple(bound.tensor(step.inputs[r]) for r in ("latent", "k_rope") if r in step.inputs)
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    sizes, kv_b = Latent.of(bound, step), bound.matrix(step, "kv_b")
    (most,) = ints(step, "index_topk")
    layer = kept_by(step.attrs, step.layer)
    caches = [bound.cache(layer, "latent")] if bound.home(device) else []
    columns = slice(0, sizes.rank + sizes.rope)
    of_query = sizes.heads * (2 * sizes.rank + sizes.rope) * KIND.itemsize

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        if layer == step.layer:
            append(call, rows, (new,), caches)
        queries = q[: rows.count].view(rows.count, sizes.heads, -1)
        result = y[: rows.count].view(rows.count, sizes.heads, -1)
        if rows.reach is None:
            seen = seen_rows(bound, step, call, "latent", columns, new, KIND)
            if all(span.position + span.last - span.first <= most for span in rows.spans):
                of_sequence(rows, queries, seen, kv_b, result, sizes)
                return
        else:
            seen = caches[0]

        def seen_by(part: slice) -> tuple[Tensor, Tensor]:
            place = chosen[part].long()
            at = place.clamp(min=0)
            if rows.reach is not None:
                at = rows.reach[part].gather(1, at.clamp(max=rows.reach.shape[1] - 1))
            never = torch.zeros(place.shape, device=place.device)
            return seen[at].to(KIND), never.masked_fill_(place < 0, float("-inf"))

        def block(some: slice) -> None:
            of_queries(
                rows.positions[some],
                queries[some],
                lambda part: seen_by(slice(some.start + part.start, some.start + part.stop)),
                most,
                kv_b,
                result[some],
                sizes,
            )

        for some in scratch.blocks(0, rows.count, of_query, scratch.quarter()):
            block(some)

    return work
