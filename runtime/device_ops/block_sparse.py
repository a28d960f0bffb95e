"""Block-sparse attention on a device, by PyTorch, in bounded memory: the indexer's choice of
blocks, and attention to what was chosen.

Tokens that see no more blocks than are chosen attend as ever; the others gather what they read, so
that what is read of a long context is bounded by what was chosen. What some rows or sequences make
takes a quarter of `scratch.BYTES`; but one is the least.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hmc.blocks.block_sparse import chosen_blocks
from hmc.ops.attention import NO_BOUNDS
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.attention import attend
from hmc.runtime.device_ops.base import Bound, Work, ints
from hmc.runtime.device_ops.context import (
    HIDDEN,
    KIND,
    SCORE,
    append,
    batches,
    chunks,
    reached,
    seen_rows,
)
from hmc.runtime.device_ops.shares import Call, Rows

_SCORES = 5 * 4
"""Bytes of a score of the indexer, with what is made of it."""


def index_blocks(bound: Bound, step: Step) -> Work:
    """Scores of all positions that tokens see, and the best blocks of them."""
    q, fresh = (bound.tensor(step.inputs[role]) for role in ("q", "indexer_k"))
    chosen, share, device = (
        bound.tensor(step.outputs["chosen"]),
        bound.share(step),
        bound.device(step),
    )
    heads, dim, size, most, local = ints(
        step, "heads", "dim", "index_block", "index_topk", "index_local"
    )
    caches = [bound.cache(step.layer, "indexer_k")] if bound.home(device) else []

    def choose(rows: Rows, part: slice, keys: Tensor) -> None:
        """By keys [S, dim] of one sequence, or [n, S, dim] of many."""
        queries = q[part].reshape(-1, heads, dim).to(KIND)
        scores = queries @ keys.transpose(-1, -2)
        found = chosen_blocks(scores, rows.positions[part], size, most, local)
        chosen[part] = found.flatten(1)

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, ((fresh,),), caches)
        if rows.reach is not None:
            for part in batches(rows, 4 * heads * dim, 2 * 4 * dim + heads * _SCORES + HIDDEN):
                reach, _ = reached(rows, part, NO_BOUNDS)
                choose(rows, part, caches[0][reach].to(KIND))
            return
        keys = seen_rows(bound, step, call, "indexer_k", slice(0, dim), (fresh,), KIND)
        for part, high, _ in chunks(rows, NO_BOUNDS, 4 * heads * dim, heads * _SCORES):
            choose(rows, part, keys[:high])

    return work


def sparse_attention(bound: Bound, step: Step) -> Work:
    """Grouped-query attention of each token to the blocks it chose."""
    q, k, v, chosen = (bound.tensor(step.inputs[role]) for role in ("q", "k", "v", "chosen"))
    y, share, device = bound.tensor(step.outputs["y"]), bound.share(step), bound.device(step)
    heads, kv_heads, head_dim, v_dim = ints(step, "heads", "kv_heads", "head_dim", "v_dim")
    index_heads, size, most = ints(step, "index_heads", "index_block", "index_topk")
    scale, group = float(step.attrs["scale"]), heads // kv_heads
    caches = [bound.cache(step.layer, name) for name in ("k", "v")] if bound.home(device) else []
    of_place = 2 * (head_dim + v_dim) * KIND.itemsize
    of_row = group * KIND.itemsize * (head_dim + 2 * max(head_dim, v_dim))

    def row_bytes(length: int) -> int:
        """Of a token that gathers what it reads of `length` positions."""
        read = min(length, most * size)
        return kv_heads * (of_row + read * (of_place + group * SCORE + HIDDEN + 8))

    def gathered(part: slice, where: Tensor, hidden: Tensor, held: Sequence[Tensor]) -> None:
        """Attention to rows `where` [n, kv_heads, L] of keys and values, but for `hidden` ones."""
        head = torch.arange(kv_heads, device=where.device)[:, None]
        keys, values = (each.view(len(each), kv_heads, -1)[where, head].to(KIND) for each in held)
        wide = q[part].reshape(-1, kv_heads, group, head_dim).to(KIND)
        scores = wide @ keys.transpose(-1, -2) * scale
        weights = scores.masked_fill_(hidden[:, :, None], float("-inf")).softmax(-1)
        y[part] = (weights @ values).flatten(1).to(y.dtype)

    def read(rows: Rows, part: slice, length: int) -> tuple[Tensor, Tensor]:
        """Positions [n, kv_heads, L] of what tokens chose of `length`, and which are not seen."""
        number = min(most, -(-length // size))
        blocks = chosen[part].reshape(-1, index_heads, most)[..., :number].long()
        where = (blocks[..., None] * size + torch.arange(size, device=blocks.device)).flatten(2)
        hidden = (where < 0) | (where > rows.positions[part][:, None, None])
        per = kv_heads // index_heads
        where = where.clamp(0, length - 1).repeat_interleave(per, 1)
        return where, hidden.repeat_interleave(per, 1)

    def one(call: Call, rows: Rows) -> None:
        held = [
            seen_rows(bound, step, call, name, slice(0, new.shape[1]), (new,), KIND)
            for name, new in (("k", k), ("v", v))
        ]
        for part, high, _ in chunks(rows, NO_BOUNDS, heads * of_row, heads * SCORE + HIDDEN):
            if high <= most * size:
                wide = q[part].reshape(-1, heads, head_dim).to(KIND)
                keys, values = (each[:high].view(high, kv_heads, -1) for each in held)
                y[part] = attend(wide, keys, values, scale, NO_BOUNDS).to(y.dtype)
                continue
            for some in scratch.blocks(part.start, part.stop, row_bytes(high), scratch.quarter()):
                gathered(some, *read(rows, some, high), held)

    def many(rows: Rows, reach: Tensor) -> None:
        length = reach.shape[1]
        for part in scratch.blocks(0, rows.count, row_bytes(length), scratch.quarter()):
            where, hidden = read(rows, part, length)
            slots = reach[part].gather(1, where.flatten(1)).view(where.shape)
            gathered(part, slots, hidden, caches)

    def work(call: Call) -> None:
        rows = call.rows[share, device]
        append(call, rows, ((k,), (v,)), caches)
        if rows.reach is None:
            one(call, rows)
        else:
            many(rows, rows.reach)

    return work
