"""Kernels: slots (token * top_k + rank of its expert) in the order of their experts, ascending
within each, and where those of each expert begin.

Numbers of a slot that are below 0 are no expert's: they come first. The place of a slot is counted,
so no order of threads shows. Few slots take one launch; many take three, since a program sees some
of them: `histogram`, `scanned`, `placed`.
"""

from __future__ import annotations

from typing import Any

tl: Any = None


def sorted_few(ids, order, edges, slots, experts, OWN: tl.constexpr, MANY: tl.constexpr,
               EXPERTS: tl.constexpr):  # fmt: skip
    """`order` [slots] and `edges` [experts + 1] of `ids` i32 [slots].

    Programs: tiles of OWN slots, and tiles of EXPERTS edges after them; each looks at all ids, MANY
    at a time.
    """
    tile = tl.program_id(0)
    tiles = (slots + OWN - 1) // OWN
    other = tl.arange(0, MANY)
    if tile < tiles:
        slot = tile * OWN + tl.arange(0, OWN)
        mine = tl.maximum(tl.load(ids + slot, slot < slots, 0), -1)
        place = tl.full((OWN,), 0, tl.int32)
        for first in range(0, slots, MANY):
            them = first + other
            theirs = tl.maximum(tl.load(ids + them, them < slots, 0), -1)
            ahead = theirs[None, :] < mine[:, None]
            ahead |= (theirs[None, :] == mine[:, None]) & (them[None, :] < slot[:, None])
            place += tl.sum((ahead & (them < slots)[None, :]).to(tl.int32), 1)
        tl.store(order + place, slot.to(order.dtype.element_ty), slot < slots)
    else:
        expert = (tile - tiles) * EXPERTS + tl.arange(0, EXPERTS)
        edge = tl.full((EXPERTS,), 0, tl.int32)
        for first in range(0, slots, MANY):
            them = first + other
            theirs = tl.load(ids + them, them < slots, 0x7FFFFFFF)
            edge += tl.sum((theirs[None, :] < expert[:, None]).to(tl.int32), 1)
        tl.store(edges + expert, edge.to(edges.dtype.element_ty), expert <= experts)


def histogram(ids, counts, slots, bins, OWN: tl.constexpr, BINS: tl.constexpr):
    """counts i32 [chunks, bins]: how many of each chunk of OWN slots have expert bin - 1 (bin 0:
    none). Programs: (chunks, tiles of BINS bins)."""
    slot = tl.program_id(0) * OWN + tl.arange(0, OWN)
    bin = tl.program_id(1) * BINS + tl.arange(0, BINS)
    mine = tl.maximum(tl.load(ids + slot, slot < slots, 0x7FFFFFF0), -1) + 1
    found = tl.sum((mine[:, None] == bin[None, :]).to(tl.int32), 0)
    tl.store(counts + tl.program_id(0) * bins + bin, found, bin < bins)


def scanned(counts, totals, edges, counter, chunks, bins, experts, MANY: tl.constexpr,
            BINS: tl.constexpr, ALL: tl.constexpr):  # fmt: skip
    """Each of `counts` becomes the sum of those above it; `edges` [experts + 1] follow from the
    sums of all, which stand in `totals` i32 [bins] meanwhile.

    Programs: tiles of BINS bins; the last to arrive makes the edges. `counter` i32 [1] is 0 before
    and after; ALL is a power of two no smaller than bins.
    """
    bin = tl.program_id(0) * BINS + tl.arange(0, BINS)
    chunk = tl.arange(0, MANY)
    total = tl.full((BINS,), 0, tl.int32)
    for first in range(0, chunks, MANY):
        inside = (first + chunk < chunks)[:, None] & (bin < bins)[None, :]
        at = counts + (first + chunk)[:, None] * bins + bin[None, :]
        count = tl.load(at, inside, 0)
        tl.store(at, tl.cumsum(count, 0) - count + total[None, :], inside)
        total += tl.sum(count, 0)
    tl.store(totals + bin, total, bin < bins)
    tl.debug_barrier()  # the one thread that counts speaks for all that have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel") == tl.num_programs(0) - 1
    tl.debug_barrier()
    if last:
        every = tl.arange(0, ALL)
        sums = tl.load(totals + every, every < bins, 0, cache_modifier=".cg")
        # an expert's slots begin where those of all bins up to its number's end
        edge = tl.cumsum(sums, 0)
        tl.store(edges + every, edge.to(edges.dtype.element_ty), every <= experts)
        tl.store(counter, 0)


def placed(ids, order, counts, edges, slots, bins, OWN: tl.constexpr):
    """`order` [slots]: each slot at its expert's edge, behind those of earlier chunks and the
    earlier ones of its own. Programs: chunks of OWN slots."""
    number = tl.arange(0, OWN)
    slot = tl.program_id(0) * OWN + number
    mine = tl.maximum(tl.load(ids + slot, slot < slots, -1), -1)
    before = tl.load(counts + tl.program_id(0) * bins + (mine + 1), slot < slots, 0)
    begin = tl.load(edges + mine, (slot < slots) & (mine >= 0), 0).to(tl.int32)
    theirs = tl.maximum(tl.load(ids + slot, slot < slots, -1), -1)
    earlier = (theirs[None, :] == mine[:, None]) & (number[None, :] < number[:, None])
    place = begin + before + tl.sum(earlier.to(tl.int32), 1)
    tl.store(order + place, slot.to(order.dtype.element_ty), slot < slots)
