"""What attention on a device reads of a call's context: cache rows, which of them each query sees,
and in how many blocks.

New rows are put into the home GPU's cache first, in bf16, and read from there; by other GPUs of a
call from the buffers, rounded likewise, so that later calls see what this one saw.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from hmc.ops import kept_by
from hmc.ops.attention import NO_BOUNDS, Bounds, Growth
from hmc.plan import Step
from hmc.runtime.device_ops import scratch
from hmc.runtime.device_ops.base import Bound
from hmc.runtime.device_ops.shares import Call, Rows

CACHED, KIND = torch.bfloat16, torch.float32
"""What caches hold, and the operands of products where PyTorch computes them."""
SCORE = 4 + 4 + 4
"""Bytes of a score that is kept: in f32, as a weight in f32, and as one of the operands."""
HIDDEN = 4 + 1 + 1
"""Bytes of an element of a mask: itself in f32, and what it is made of."""


def append(
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
            cache.index_copy_(0, slots[some], together.to(CACHED))


def seen_rows(
    bound: Bound,
    step: Step,
    call: Call,
    state: str,
    columns: slice,
    new: tuple[Tensor, ...],
    kind: torch.dtype,
    low: int = 0,
) -> Tensor:
    """Cache rows [past + T - low, width] of every position from `low` up to the call's last:
    `columns` of them. Away from the cache those of this call are `new` side by side, rounded as the
    cache rounds them. An earlier layer may keep the rows (`kept_by`)."""
    layer = kept_by(step.attrs, step.layer)
    if bound.home(bound.device(step)):
        slots = torch.cat((call.past_slots, call.slots)) if call.past else call.slots
        return bound.cache(layer, state)[:, columns][slots[low:]].to(kind)
    width, old = columns.stop - columns.start, max(0, call.past - low)
    first = max(0, low - call.past)
    found = new[0].new_empty((old + call.tokens - first, width), dtype=kind)
    if old:
        # of GPUs in other processes only the rows are known, and not the cache
        paged = bound.link is None
        past = bound.cache(layer, state) if paged else bound.before(call, layer, state)
        rows, slots = past[low:, columns] if not paged else past[:, columns], call.past_slots[low:]
        for some in scratch.blocks(0, old, 2 * 2 * width, scratch.quarter()):
            found[some] = rows[slots[some]] if paged else rows[some]
    place = found[old:]
    for each in new:
        mine = each[first : call.tokens]
        for some in scratch.blocks(0, len(mine), 2 * each.shape[1], scratch.quarter()):
            place[some, : each.shape[1]] = mine[some].to(CACHED)
        place = place[:, each.shape[1] :]
    return found


def first_of(rows: Rows, bounds: Bounds) -> int:
    """The first position that rows of one sequence see."""
    return max(0, min((int(bounds.first(span.position)) for span in rows.spans), default=0))


def chunks(
    rows: Rows, bounds: Bounds, of_row: int, of_score: int
) -> Iterator[tuple[slice, int, int]]:
    """Some query rows, the position after their last, and the first position they see; as many as
    bytes for each row and for each position it may see allow."""
    for span in rows.spans:
        of_query = of_row + of_score * (span.position + span.last - span.first)
        for some in scratch.blocks(span.first, span.last, of_query, scratch.quarter()):
            start = span.position + some.start - span.first
            yield some, start + some.stop - some.start, max(0, bounds.first(start))


def later(
    position: int, tokens: int, total: int, device: torch.device, bounds: Bounds = NO_BOUNDS
) -> Tensor:
    """What is added to scores f32 [tokens, total] of queries from `position` on: 0, or -inf where a
    key is later (or earlier than the first they see)."""
    query = torch.arange(position, position + tokens, device=device)[:, None]
    key = torch.arange(total, device=device)[None]
    hidden = key > query
    if bounds.reach:
        hidden |= key < bounds.first(query)
    return torch.zeros(hidden.shape, device=device).masked_fill_(hidden, float("-inf"))


def batches(rows: Rows, of_row: int, of_place: int) -> Iterator[slice]:
    """Some sequences: as many as bytes for each and for each of its cache rows allow."""
    assert rows.reach is not None
    of_sequence = of_row + rows.reach.shape[1] * of_place
    return scratch.blocks(0, rows.count, of_sequence, scratch.quarter())


def reached(rows: Rows, part: slice, bounds: Bounds) -> tuple[Tensor, Tensor]:
    """The cache rows that some sequences see [n, longest], and what is added to their scores: 0 or
    -inf."""
    assert rows.reach is not None and rows.lengths is not None
    reach, lengths = rows.reach[part], rows.lengths[part, None]
    place = torch.arange(reach.shape[1], device=reach.device)[None]
    hidden = place >= lengths
    if bounds.reach:
        hidden |= place < bounds.first(lengths - 1)
    never = torch.zeros_like(hidden, dtype=torch.float32).masked_fill_(hidden, float("-inf"))
    return reach, never


def grown(q: Tensor, positions: Tensor, growth: Growth) -> Tensor:
    """Queries [n, ...] at `positions` i64 [n], each times what it grows by."""
    if growth is None:
        return q
    by, every, start = growth
    factor = 1 + by * torch.log1p(((positions + start) // every).float())
    return q * factor.view(-1, *(1,) * (q.ndim - 1))
