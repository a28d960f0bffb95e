"""Kernel: causal attention of many queries of one sequence at consecutive positions, over keys and
values that lie in the order of positions. Device functions and the pieces of a head's columns are
those of attend.py; the second piece of keys may lie elsewhere, as what all heads turn alike does.

Keys that all of a tile's queries see are taken without a mask, and only those about its diagonal,
or about the window's edge, with one. Tiles with the most keys come first.
"""

from __future__ import annotations

from typing import Any

tl: Any = None
score_of: Any = None
weighed: Any = None
started: Any = None
longer: Any = None


def attend_prompt(q, keys, rests, values, sinks, y, scale, growth, tokens, past, before, q_stride,
                  k_stride, r_stride, v_stride, y_stride, GROUP: tl.constexpr,
                  HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, K_HEAD: tl.constexpr,
                  R_HEAD: tl.constexpr, V_HEAD: tl.constexpr, WINDOW: tl.constexpr,
                  CHUNK: tl.constexpr, SOFTCAP: tl.constexpr, SINKS: tl.constexpr,
                  EVERY: tl.constexpr, AHEAD: tl.constexpr, QUERIES: tl.constexpr,
                  CUT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr, WIDE: tl.constexpr,
                  KEYS: tl.constexpr):  # fmt: skip
    """y bf16 [tokens, heads * V_DIM] of q [tokens, heads * HEAD_DIM] at places from `past` on,
    over bf16 rows [past + tokens] of keys' first CUT columns, of their `rests` and of values, the
    key heads' K_HEAD, R_HEAD and V_HEAD apart; options as of `attend`. Positions are places behind
    `before` others, which with CHUNK are whole ones.

    Programs: (tiles of QUERIES tokens, heads).
    """
    first = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    head = tl.program_id(1)
    kv_head = head // GROUP
    token = first + tl.arange(0, QUERIES)
    live = token < tokens
    PIECES: tl.constexpr = CUT < HEAD_DIM
    main, late, wide = tl.arange(0, MAIN), tl.arange(0, REST), tl.arange(0, WIDE)
    at = q + (token.to(tl.int64) * q_stride + head * HEAD_DIM)[:, None]
    own = (before + past + token)[:, None]
    query = tl.load(at + main[None, :], live[:, None] & (main < CUT)[None, :], 0.0)
    query = longer(query, growth, own, EVERY, AHEAD)
    rest = query
    if PIECES:
        of_rest = live[:, None] & (CUT + late < HEAD_DIM)[None, :]
        rest = tl.load(at + (CUT + late)[None, :], of_rest, 0.0)
        rest = longer(rest, growth, own, EVERY, AHEAD)
    top, total = started(sinks, head + token * 0, live, live, SINKS)
    mixed = tl.full((QUERIES, WIDE), 0.0, tl.float32)

    position = past + token
    own_keys, own_rests = keys + kv_head * K_HEAD, rests + kv_head * R_HEAD
    own_values = values + kv_head * V_HEAD
    low = 0
    if WINDOW:
        low = tl.maximum(past + first - (WINDOW - 1), 0) // KEYS * KEYS
    if CHUNK:
        low = (past + first) // CHUNK * CHUNK // KEYS * KEYS
    middle = tl.maximum((past + first + 1) // KEYS * KEYS, low)
    high = past + tl.minimum(first + QUERIES, tokens)
    for begin in range(low, middle, KEYS):
        top, total, mixed = tile_weighed(
            query, rest, own_keys, own_rests, own_values, position, begin, high, scale, k_stride,
            r_stride, v_stride, top, total, mixed, False, HEAD_DIM, V_DIM, WINDOW, CHUNK, SOFTCAP,
            CUT, MAIN, REST, WIDE, KEYS)  # fmt: skip
    for begin in range(middle, high, KEYS):
        top, total, mixed = tile_weighed(
            query, rest, own_keys, own_rests, own_values, position, begin, high, scale, k_stride,
            r_stride, v_stride, top, total, mixed, True, HEAD_DIM, V_DIM, WINDOW, CHUNK, SOFTCAP,
            CUT, MAIN, REST, WIDE, KEYS)  # fmt: skip
    to = y + (token.to(tl.int64) * y_stride + head * V_DIM)[:, None] + wide[None, :]
    found = mixed / total[:, None]
    tl.store(to, found.to(y.dtype.element_ty), live[:, None] & (wide < V_DIM)[None, :])


def tile_weighed(query, rest, keys, rests, values, position, begin, high, scale, k_stride, r_stride,
                 v_stride, top, total, mixed, LATEST: tl.constexpr, HEAD_DIM: tl.constexpr,
                 V_DIM: tl.constexpr, WINDOW: tl.constexpr, CHUNK: tl.constexpr,
                 SOFTCAP: tl.constexpr, CUT: tl.constexpr, MAIN: tl.constexpr, REST: tl.constexpr,
                 WIDE: tl.constexpr, KEYS: tl.constexpr):  # fmt: skip
    """(top, total, mixed) with the KEYS keys from `begin` on; where they are the LATEST, some may
    be later than a query, or behind the last one."""
    PIECES: tl.constexpr = CUT < HEAD_DIM
    main, late, wide = tl.arange(0, MAIN), tl.arange(0, REST), tl.arange(0, WIDE)
    place = begin + tl.arange(0, KEYS)
    from_key = keys + (place.to(tl.int64) * k_stride)[:, None]
    from_value = values + (place.to(tl.int64) * v_stride)[:, None] + wide[None, :]
    of_main, of_rest = (main < CUT)[None, :], (CUT + late < HEAD_DIM)[None, :]
    of_wide = (wide < V_DIM)[None, :]
    if LATEST:
        inside = (place < high)[:, None]
        of_main, of_rest, of_wide = of_main & inside, of_rest & inside, of_wide & inside
    key = tl.load(from_key + main[None, :], of_main, 0.0)
    key_rest = key
    if PIECES:
        from_rest = rests + (place.to(tl.int64) * r_stride)[:, None] + late[None, :]
        key_rest = tl.load(from_rest, of_rest, 0.0)
    value = tl.load(from_value, of_wide, 0.0)
    score = score_of(query, rest, key, key_rest, scale, SOFTCAP, PIECES)
    if LATEST:
        score = tl.where(place[None, :] <= position[:, None], score, -float("inf"))
    if WINDOW:
        near = place[None, :] > position[:, None] - WINDOW
        score = tl.where(near, score, -float("inf"))
    if CHUNK:
        near = place[None, :] >= position[:, None] // CHUNK * CHUNK
        score = tl.where(near, score, -float("inf"))
    return weighed(score, value, top, total, mixed)
