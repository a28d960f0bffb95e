"""Kernel: attention of one query a sequence over its cached keys and values, read where they lie.

Rows of the cache are found through a table of blocks: block `position // BLOCK` of a sequence is at
row `table * BLOCK`; with BLOCK 1 the table holds rows. A program has some heads that share keys,
and a part of the keys; the last of a tile's programs to arrive joins the parts in their order.
Lengths are read on the device, and parts are made of what a sequence has: a captured launch is
replayed for any lengths that its tables hold.

A head's columns are read in two pieces, the first CUT of them and the rest, each padded to a power
of two (MAIN, REST): 192 are 128 + 64. Latent attention is attention with one key head whose values
are the first piece of its keys (SHARED).

Products are bf16 with f32 sums. Scores and exponents are in powers of two.
"""

from __future__ import annotations

from typing import Any

tl: Any = None


def score_of(query, rest, key, key_rest, scale, SOFTCAP: tl.constexpr, PIECES: tl.constexpr):
    """f32 [heads, keys], times log2(e): products of queries with keys [keys, columns], scaled, and
    with SOFTCAP c as c tanh(score / c)."""
    score = tl.dot(query, tl.trans(key))
    if PIECES:
        score = tl.dot(rest, tl.trans(key_rest), score)
    if SOFTCAP > 0.0:
        score = capped(score * scale, SOFTCAP)
    else:
        score = score * (scale * 1.4426950408889634)
    return score


def capped(score, SOFTCAP: tl.constexpr):
    """log2(e) c tanh(score / c), to some 1e-7 c."""
    grown = tl.exp2(score * (2.0 * 1.4426950408889634 / SOFTCAP))
    return (1.4426950408889634 * SOFTCAP) * (1.0 - 2.0 / (grown + 1.0))


def weighed(score, value, top, total, mixed):
    """(top, total, mixed) with the keys of `score` besides, whose values are `value`."""
    high = tl.maximum(top, tl.max(score, 1))
    weight = tl.exp2(score - high[:, None])
    shrink = tl.exp2(top - high)
    total = total * shrink + tl.sum(weight, 1)
    mixed = tl.dot(weight.to(tl.bfloat16), value, mixed * shrink[:, None])
    return high, total, mixed


def started(sinks, head, live, first, SINKS: tl.constexpr):
    """(top, total) before any key: a sink counts as one whose value is 0, for those who are
    `first`."""
    if SINKS:
        sink = tl.load(sinks + head, live & first, 0.0).to(tl.float32) * 1.4426950408889634
        top = tl.where(live & first, sink, -1.0e38)
        total = tl.where(live & first, 1.0, 0.0)
    else:
        top = tl.where(live, -1.0e38, -1.0e38)
        total = tl.where(live, 0.0, 0.0)
    return top, total


def longer(query, growth, position, EVERY: tl.constexpr, AHEAD: tl.constexpr):
    """Queries [n, columns] times 1 + growth * log(1 + (position + AHEAD) // EVERY), of one position
    or n."""
    if EVERY:
        steps = (position + (AHEAD + EVERY)) // EVERY
        query = query * (1.0 + growth * tl.log(steps.to(tl.float32)))
    return query.to(tl.bfloat16)


def attend(q, keys, values, tables, lengths, sinks, y, partials, counters, scale, growth, q_stride,
           k_stride, v_stride, y_stride, table_stride, splits, GROUP: tl.constexpr,
           HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
           SOFTCAP: tl.constexpr, SINKS: tl.constexpr, EVERY: tl.constexpr, AHEAD: tl.constexpr,
           SHARED: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr, CUT: tl.constexpr,
           MAIN: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr, KEYS: tl.constexpr,
           SPLITS: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """y bf16 [sequences, heads * V_DIM] of q [sequences, heads * HEAD_DIM] over keys and values
    bf16 [cache rows, key heads * HEAD_DIM or V_DIM], the first `lengths` of each sequence (with
    WINDOW the last WINDOW of these, with CHUNK those of the last one's chunk); zeros where a
    sequence has none. With EVERY, queries are `longer`.

    Programs: (tiles of HEADS of the GROUP heads of each key head, sequences, splits <= SPLITS).
    `partials` f32 [tiles, splits, HEADS * (WIDE + 2)]; `counters` i32 [sequences * tiles] are 0
    before and after. `sinks` f32 [heads].
    """
    tile, token, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    across: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    kv_head = tile // across
    member = tile % across * HEADS + tl.arange(0, HEADS)
    live = member < GROUP
    head = kv_head * GROUP + member
    seen = tl.load(lengths + token).to(tl.int32)
    low = 0
    if WINDOW:
        low = tl.maximum(seen - WINDOW, 0)
    if CHUNK:
        low = tl.maximum(seen - 1, 0) // CHUNK * CHUNK
    steps = (seen - low + (KEYS - 1)) // KEYS
    each = tl.maximum((steps + splits - 1) // splits, 1)
    used = tl.maximum((steps + each - 1) // each, 1)
    if split >= used:
        return
    begin = low + split * each * KEYS
    end = tl.minimum(begin + each * KEYS, seen)

    PIECES: tl.constexpr = CUT < HEAD_DIM
    main, late, wide = tl.arange(0, MAIN), tl.arange(0, REST), tl.arange(0, WIDE)
    at = q + (token.to(tl.int64) * q_stride + head * HEAD_DIM)[:, None]
    of_main, of_rest = (main < CUT)[None, :], (CUT + late < HEAD_DIM)[None, :]
    query = tl.load(at + main[None, :], live[:, None] & of_main, 0.0)
    query = longer(query, growth, seen - 1, EVERY, AHEAD)
    rest = query
    if PIECES:
        rest = tl.load(at + (CUT + late)[None, :], live[:, None] & of_rest, 0.0)
        rest = longer(rest, growth, seen - 1, EVERY, AHEAD)
    top, total = started(sinks, head, live, split == 0, SINKS)
    mixed = tl.full((HEADS, WIDE), 0.0, tl.float32)
    table = tables + token.to(tl.int64) * table_stride
    for first in range(begin, end, KEYS):
        place = first + tl.arange(0, KEYS)
        inside = place < end
        block = tl.load(table + place // BLOCK, inside, 0).to(tl.int64)
        row = block * BLOCK + place % BLOCK
        from_key = keys + (row * k_stride + kv_head * HEAD_DIM)[:, None]
        key = tl.load(from_key + main[None, :], inside[:, None] & of_main, 0.0)
        key_rest = key
        if PIECES:
            key_rest = tl.load(from_key + (CUT + late)[None, :], inside[:, None] & of_rest, 0.0)
        if SHARED:
            value = key
        else:
            from_value = values + (row * v_stride + kv_head * V_DIM)[:, None] + wide[None, :]
            value = tl.load(from_value, inside[:, None] & (wide < V_DIM)[None, :], 0.0)
        score = score_of(query, rest, key, key_rest, scale, SOFTCAP, PIECES)
        score = tl.where(inside[None, :], score, -float("inf"))
        top, total, mixed = weighed(score, value, top, total, mixed)

    mine = live
    if used > 1:
        number = token * tl.num_programs(0) + tile
        own = partials + number.to(tl.int64) * splits * (HEADS * (WIDE + 2))
        last, top, total, mixed = parts_joined(
            top, total, mixed, own, counters + number, live, split, used, HEADS, WIDE, SPLITS,
            UNROLL)  # fmt: skip
        mine = mine & last
    found = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
    to = y + (token.to(tl.int64) * y_stride + head * V_DIM)[:, None] + wide[None, :]
    tl.store(to, found.to(y.dtype.element_ty), mine[:, None] & (wide < V_DIM)[None, :])


def parts_joined(top, total, mixed, own, counter, live, split, used, HEADS: tl.constexpr,
                 WIDE: tl.constexpr, SPLITS: tl.constexpr, UNROLL: tl.constexpr):  # fmt: skip
    """(whether this program is the last of the `used` ones to arrive, and then top, total and mixed
    of all their keys, in the order of parts; else anything). `own` is the tile's place: mixed of
    every part, then top and total of every part. UNROLL parts are under way at once."""
    head, wide, part = tl.arange(0, HEADS), tl.arange(0, WIDE), tl.arange(0, SPLITS)
    place = head[:, None] * WIDE + wide[None, :]
    ends = own + used * (HEADS * WIDE)
    tl.store(own + split * (HEADS * WIDE) + place, mixed, live[:, None])
    tl.store(ends + split * (2 * HEADS) + head, top)
    tl.store(ends + split * (2 * HEADS) + HEADS + head, total)
    tl.debug_barrier()  # the one thread that counts speaks for all that have stored
    last = tl.atomic_add(counter, 1, sem="acq_rel") == used - 1
    tl.debug_barrier()
    if last:
        at = ends + part[:, None] * (2 * HEADS) + head[None, :]
        known = (part < used)[:, None]
        tops = tl.load(at, known, -1.0e38, cache_modifier=".cg")
        totals = tl.load(at + HEADS, known, 0.0, cache_modifier=".cg")
        top = tl.max(tops, 0)
        total = tl.sum(totals * tl.exp2(tops - top[None, :]), 0)
        mixed = tl.full((HEADS, WIDE), 0.0, tl.float32)
        for each in tl.range(used, loop_unroll_factor=UNROLL):
            high = tl.load(ends + each * (2 * HEADS) + head, cache_modifier=".cg")
            from_part = own + each * (HEADS * WIDE) + place
            value = tl.load(from_part, live[:, None], 0.0, cache_modifier=".cg")
            mixed += value * tl.exp2(high - top)[:, None]
        tl.store(counter, 0)
    return last, top, total, mixed
