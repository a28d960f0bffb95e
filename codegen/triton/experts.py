"""Kernels of routed experts: all experts of a step in one launch, found on the device.

`slots` (token * top_k + rank) are sorted by expert, ascending within each. The experts of a step
are `ids` [experts], `table` i64 [experts, planes of gate, up and down] their planes' addresses,
without GATED of up and down alone. With BIAS, of float32, float16 or bfloat16, those of the same
matrices' biases follow.
Where the slots of a range of tokens begin and end for each expert of the model is told by `begins`
and `ends`: `edges` and what follows its first element for all tokens, rows of `bounds` for a part.

Rows of `act` are slots, counted from the first of the range of tokens: its size is bounded by the
range. y is added to where it lies, by the one program that owns it, expert after expert: sums have
one order, and no product of a slot is kept.
"""

from __future__ import annotations

from typing import Any

tl: Any = None
sums: Any = None
joined: Any = None
activation: Any = None
planes_at: Any = None
SCALES: Any = None


def bounds(slots, edges, found, experts, tokens, top_k, steps, BLOCK: tl.constexpr):
    """found i32 [ranges + 1, experts]: where the slots of each expert reach token range * `tokens`.

    Programs: (ranges + 1, blocks of experts); 2^steps are more than the slots of an expert.
    """
    expert = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = expert < experts
    low = tl.load(edges + expert, known, 0).to(tl.int32)
    high = tl.load(edges + expert + 1, known, 0).to(tl.int32)
    least = tl.program_id(0).to(tl.int64) * tokens * top_k
    for _ in range(steps):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(slots + middle, low < high, 0).to(tl.int64) < least)
        high = tl.where(below | (low >= high), high, middle)
        low = tl.where(below, middle + 1, low)
    tl.store(found + tl.program_id(0) * experts + expert, low, known)


def tiles(ids, begins, ends, experts, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """Of every expert of a step, i32 [EXPERTS]: where its slots begin and end, and the number of
    tiles of TOKENS of them up to its last, experts one after the other."""
    each = tl.arange(0, EXPERTS)
    mine = tl.load(ids + each, each < experts, 0)
    low = tl.load(begins + mine, each < experts, 0).to(tl.int32)
    high = tl.load(ends + mine, each < experts, 0).to(tl.int32)
    return low, high, tl.cumsum((high - low + (TOKENS - 1)) // TOKENS, 0)


def tile_at(tile, low, high, last, TOKENS: tl.constexpr, EXPERTS: tl.constexpr):
    """(expert of the step, first slot's place, end of the expert's slots) of a tile."""
    expert = tl.sum((last <= tile).to(tl.int32), 0)
    own = tl.arange(0, EXPERTS) == expert
    begin = tl.sum(tl.where(own, low, 0), 0)
    end = tl.sum(tl.where(own, high, 0), 0)
    before = tl.sum(tl.where(own, last, 0), 0) - (end - begin + (TOKENS - 1)) // TOKENS
    return expert, begin + (tile - before) * TOKENS, end


def bias_at(table, row, rows, BIAS: tl.constexpr):
    """f32 [ROWS, 1]: the rows' elements of a bias whose address is at `table`."""
    if BIAS == "float32":
        words = tl.load(table).to(tl.pointer_type(tl.float32))
    elif BIAS == "float16":
        words = tl.load(table).to(tl.pointer_type(tl.float16))
    else:
        words = tl.load(table).to(tl.pointer_type(tl.bfloat16))
    return tl.load(words + row, row < rows, 0.0).to(tl.float32)[:, None]


def experts_act(x, height, slots, routing, ids, begins, ends, table, values, act, first_slot,
                experts, top_k, rows, columns, stride, ROWS: tl.constexpr, TOKENS: tl.constexpr,
                DEPTH: tl.constexpr, REPEAT: tl.constexpr, EXPERTS: tl.constexpr,
                WIDTH: tl.constexpr, BIAS: tl.constexpr, WEIGHED: tl.constexpr,
                GATED: tl.constexpr):  # fmt: skip
    """act bf16 [slots of the range, rows] = the activation of x gate^T and x up^T of the slots'
    experts, for those of the step; WEIGHED: also of the slots' `routing`.

    Programs: tiles of slots (those beyond the last one do nothing), tiles of rows. x are the
    `height` tokens of the range. `WIDTH` i64 of `table` are an expert's, from its first matrix on
    (below: from down on); `values` f32 are those of codes.
    """
    low, high, last = tiles(ids, begins, ends, experts, TOKENS, EXPERTS)
    tile = tl.program_id(0)
    if tile >= tl.max(last, 0):
        return
    expert, begin, end = tile_at(tile, low, high, last, TOKENS, EXPERTS)
    place = begin + tl.arange(0, TOKENS)
    live = place < end
    slot = tl.load(slots + place, live, 0).to(tl.int64)
    own = table + expert * WIDTH
    up = planes_at(own + GATED * (1 + len(SCALES)), values)
    first = tl.program_id(1) * ROWS
    one, two = sums(x, height, (slot - first_slot) // top_k, live, planes_at(own, values), up,
                    first, rows, 0, columns, columns, stride, ROWS, TOKENS, DEPTH, REPEAT,
                    GATED)  # fmt: skip
    if not GATED:
        two = one
    row = first + tl.arange(0, ROWS)
    if BIAS != "":
        last_bias = own + (WIDTH - 1)
        two += bias_at(last_bias - 1, row, rows, BIAS)
        if GATED:
            one += bias_at(last_bias - 2, row, rows, BIAS)
    weight = one
    if WEIGHED:
        weight = tl.load(routing + slot, live, 0.0)[None, :]
    found = activation(one, two, weight).to(tl.bfloat16)
    to = act + (slot - first_slot)[None, :] * rows + row[:, None]
    tl.store(to, found, live[None, :] & (row < rows)[:, None])


def weighed(found, table, routing, slot, live, row, rows, BIAS: tl.constexpr,
            WEIGHED: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """Products with down of one expert, whose planes are at `table` from down on, plus its bias, by
    the weights of slots that are `live`; of others 0."""
    if BIAS != "":
        found += bias_at(table + (2 + GATED + len(SCALES)), row, rows, BIAS)
    if WEIGHED:
        found = tl.where(live[None, :], found, 0.0)
    else:
        found *= tl.load(routing + slot, live, 0.0)[None, :]
    return found


def experts_down(act, height, slots, routing, ids, begins, ends, table, values, y, first_slot,
                 all_experts, experts, top_k, rows, columns, stride, ROWS: tl.constexpr,
                 TOKENS: tl.constexpr, DEPTH: tl.constexpr, REPEAT: tl.constexpr,
                 EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
                 WEIGHED: tl.constexpr, GATED: tl.constexpr):  # fmt: skip
    """y f32 [tokens, rows] += routing[slot] * act[slot] down^T, for the experts of the step in
    their order; WEIGHED: of rows that have been weighed.

    Programs: tiles of rows, ranges of tokens, each of which has its `all_experts` begins and ends.
    """
    range_at = tl.program_id(1) * all_experts
    low, high, last = tiles(ids, begins + range_at, ends + range_at, experts, TOKENS, EXPERTS)
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    for tile in range(tl.max(last, 0)):
        expert, begin, end = tile_at(tile, low, high, last, TOKENS, EXPERTS)
        place = begin + tl.arange(0, TOKENS)
        live = place < end
        slot = tl.load(slots + place, live, 0).to(tl.int64)
        down = planes_at(table + expert * WIDTH, values)
        found, _ = sums(act, height, slot - first_slot, live, down, down, first, rows, 0,
                        columns, columns, stride, ROWS, TOKENS, DEPTH, REPEAT, False)  # fmt: skip
        found = weighed(
            found, table + expert * WIDTH, routing, slot, live, row, rows, BIAS, WEIGHED, GATED
        )
        to = y + (slot // top_k)[None, :] * rows + row[:, None]
        inside = live[None, :] & (row < rows)[:, None]
        tl.store(to, tl.load(to, inside, 0.0) + found, inside)
        tl.debug_barrier()  # another expert's tile has these tokens in other threads


def experts_down_few(act, slots, routing, ids, begins, ends, table, values, y, partials, counters,
                     tokens, experts, top_k, rows, columns, stride, parts, ROWS: tl.constexpr,
                     TOKENS: tl.constexpr, DEPTH: tl.constexpr, REPEAT: tl.constexpr,
                     EXPERTS: tl.constexpr, WIDTH: tl.constexpr, BIAS: tl.constexpr,
                     WEIGHED: tl.constexpr, GATED: tl.constexpr, ADDS: tl.constexpr):  # fmt: skip
    """As `experts_down`, for at most TOKENS tokens: y [tokens, rows], without ADDS not read, is
    made in registers, a column of the tile for each token.

    Programs: tiles of rows, `parts` that share the experts with slots.
    """
    low, high, last = tiles(ids, begins, ends, experts, TOKENS, EXPERTS)
    first = tl.program_id(0) * ROWS
    row = first + tl.arange(0, ROWS)
    column = tl.arange(0, TOKENS)
    one = tl.full((ROWS, TOKENS), 0.0, tl.float32)
    for tile in range(tl.program_id(1), tl.max(last, 0), parts):
        expert, begin, end = tile_at(tile, low, high, last, TOKENS, EXPERTS)
        place = begin + tl.arange(0, TOKENS)
        slots_of = tl.load(slots + place, place < end, -1).to(tl.int32)
        # the slot of each token, -1 where the expert has none of it
        own = (slots_of[:, None] >= 0) & (slots_of[:, None] // top_k == column[None, :])
        slot = tl.max(tl.where(own, slots_of[:, None], -1), 0)
        live = slot >= 0
        down = planes_at(table + expert * WIDTH, values)
        found, _ = sums(act, 0, slot.to(tl.int64), live, down, down, first, rows, 0, columns,
                        columns, stride, ROWS, TOKENS, DEPTH, REPEAT, False)  # fmt: skip
        planes = table + expert * WIDTH
        one += weighed(found, planes, routing, slot, live, row, rows, BIAS, WEIGHED, GATED)
    mine, one, _ = joined(one, one, partials, counters, tl.program_id(0), tl.program_id(1), parts,
                          ROWS, TOKENS, False)  # fmt: skip
    inside = ((column < tokens) & mine)[None, :] & (row < rows)[:, None]
    to = y + column[None, :] * rows + row[:, None]
    if ADDS:
        one += tl.load(to, inside, 0.0)
    tl.store(to, one, inside)
