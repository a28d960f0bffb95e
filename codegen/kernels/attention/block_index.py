"""The indexer of block-sparse attention: scores of the blocks of positions that a token sees, and
the best ones (choose.py).

    index_append, block_scores, block_choose     few tokens, with barriers between
    index_append, block_prefill                  many tokens of one sequence

A block's score is the largest product of the query with a key of it. Few tokens: vectors run along
keys in f32, a few positions by a few heads at once; work is shared by (token, block). Many: the
tiles of prefill attention (prefill_tiles.py), whose largest scores are all that is kept; a unit's
scores never leave its worker, who chooses by them.
"""

from __future__ import annotations

import math
from functools import partial
from itertools import product
from math import gcd

from hmc.codegen.ir import F32, I16, I32, Emitter, Value, const, fconst, vec
from hmc.codegen.kernels.attention.attend_rows import NEVER, Pages
from hmc.codegen.kernels.attention.choose import ALIGN, choose, share_pieces
from hmc.codegen.kernels.attention.prefill import score, share_units
from hmc.codegen.kernels.attention.prefill_form import Form, index_form
from hmc.codegen.kernels.attention.prefill_keys import copy_key
from hmc.codegen.kernels.attention.prefill_rows import Unit
from hmc.codegen.kernels.attention.prefill_tiles import TILE_MAXIMUM, Tiles
from hmc.codegen.ragged import ceil_div
from hmc.codegen.spec import KernelSpec
from hmc.codegen.vector import for_strips, load_f32

_HEADS = 4
"""Heads whose products with a key are summed up at once."""


def block_stride(index_block: int, max_context: int) -> int:
    """Scores that a row has room for."""
    blocks = -(-max_context // index_block)
    return -(-blocks // ALIGN) * ALIGN


def block_scratch_bytes(spec: KernelSpec, max_context: int) -> int:
    """Bytes of `scratch` of `block_prefill` for each worker: what its unit takes, and the scores of
    all rows of one.
    """
    form = index_form(spec)
    rows = form.panels * form.panel
    return form.offsets["end"] + 4 * rows * block_stride(spec["index_block"], max_context)


def _seen(e: Emitter, position: Value) -> Value:
    """Blocks that a token at `position` (i64) sees; none for a negative one."""
    size = const(e.spec["index_block"])
    return ceil_div(e, e.positive(e.b.add(position, const(1))), size)


def _scored(e: Emitter, position: Value) -> Value:
    """Blocks of it that are scored: none where all are chosen."""
    seen = _seen(e, position)
    return e.b.select(e.b.icmp_signed(">", seen, const(e.spec["index_topk"])), seen, const(0))


def _choose(e: Emitter, scores: Value, position: Value, target: Value) -> None:
    """target[:] = the blocks that a token at `position` chooses by a head's scores."""
    b, seen = e.b, _seen(e, position)
    with (
        e.for_range(
            e.positive(b.sub(_scored(e, position), const(e.spec["index_local"]))), seen
        ) as own,
        b.if_then(b.icmp_signed(">", seen, const(e.spec["index_topk"]))),
    ):
        e.store(fconst(math.inf), scores, own)
    choose(e, scores, seen, e.spec["index_topk"], target)


def _target(e: Emitter, token: Value, head: Value) -> Value:
    return e.row("chosen", token, head, e.spec["index_topk"], I32)


# -- few tokens ------------------------------------------------------------------------------------


def _row(e: Emitter, token: Value, head: Value) -> Value:
    """Address of a row of scores."""
    row = e.b.add(e.b.mul(token, const(e.spec["heads"])), head)
    return e.offset(e.arg["scores"], e.b.mul(row, e.b.mul(e.arg["scores_stride"], const(4))))


def emit_block_scores(e: Emitter) -> None:
    """`block_scores`: split by (token, block)."""

    def blocks(token: Value) -> Value:
        return _scored(e, e.load_int(e.arg["positions"], token))

    def score(token: Value, low: Value, high: Value) -> None:
        pages = Pages(e, token, e.spec["block"], 1)
        with e.for_range(low, high) as block:
            for first in range(0, e.spec["heads"], _HEADS):
                heads = range(first, min(first + _HEADS, e.spec["heads"]))
                _score_block(e, token, block, pages, heads)

    share_pieces(e, blocks, score)


def _score_block(e: Emitter, token: Value, block: Value, pages: Pages, heads: range) -> None:
    """scores[head][block] of some heads."""
    b, size, dim = e.b, e.spec["index_block"], e.spec["dim"]
    run = gcd(size, e.spec["block"])
    tile = gcd(run, e.tier.registers // 8)
    first = b.mul(block, const(size))
    end = b.add(e.load_int(e.arg["positions"], token), const(1))
    end = e.minimum(b.add(first, const(size)), end)
    best = {head: e.local(F32, fconst(NEVER)) for head in heads}
    queries = {head: e.row("q", token, const(head), dim) for head in heads}
    with e.for_range(first, end, run) as start:
        row = pages.row(start, const(0))
        with e.for_range(start, e.minimum(b.add(start, const(run)), end), tile) as position:
            at = b.mul(b.add(row, b.sub(position, start)), const(2 * dim))
            keys = e.offset(e.arg["cache"], at)
            found = _products(e, keys, queries, tile)
            for (index, head), value in found.items():
                inside = b.icmp_signed("<", b.add(position, const(index)), end)
                old = b.load(best[head])
                larger = b.and_(inside, b.fcmp_ordered(">", value, old))
                b.store(b.select(larger, value, old), best[head])
    for head, slot in best.items():
        e.store(b.load(slot), _row(e, token, const(head)), block)


def _products(
    e: Emitter, keys: Value, queries: dict[int, Value], tile: int
) -> dict[tuple[int, int], Value]:
    """By (index of one of `tile` keys, head), the product of the two."""
    b, dim, kind = e.b, e.spec["dim"], vec(F32, e.lanes)
    sums = {each: e.local(kind, e.zeros(F32, e.lanes)) for each in product(range(tile), queries)}

    def strip(index: Value, count: int, way: int) -> None:
        parts = [
            load_f32(e, "bf16", e.offset(keys, const(2 * dim * n)), index, count)
            for n in range(tile)
        ]
        for head, address in queries.items():
            query = load_f32(e, "f32", address, index, count)
            for n, part in enumerate(parts):
                slot = sums[n, head]
                b.store(e.fma(query, part, b.load(slot)), slot)

    for_strips(e, dim, e.lanes, strip)
    return {each: e.reduce_add(b.load(slot)) for each, slot in sums.items()}


def emit_block_choose(e: Emitter) -> None:
    """`block_choose`: split by (token, head)."""
    b, heads = e.b, const(e.spec["heads"])
    start, stop = e.split(b.mul(e.arg["tokens"], heads))
    with e.for_range(start, stop) as item:
        token, head = b.udiv(item, heads), b.urem(item, heads)
        position = e.load_int(e.arg["positions"], token)
        _choose(e, _row(e, token, head), position, _target(e, token, head))


# -- many tokens -----------------------------------------------------------------------------------


def emit_block_prefill(e: Emitter) -> None:
    """`block_prefill`: workers share units, blocks of tokens with all heads."""
    b, form = e.b, index_form(e.spec)
    Tiles(e, form, results=False)
    rows = const(4 * form.panels * form.panel)
    size = b.add(const(form.offsets["end"]), b.mul(rows, e.arg["scores_stride"]))
    scratch = e.offset(e.arg["scratch"], b.mul(e.worker, size))

    def units(least: Value, most: Value) -> Value:
        wanted = e.b.select(e.b.icmp_signed("<", least, e.workers), e.workers, least)
        return e.minimum(wanted, most)

    share_units(e, form, scratch, units, partial(_choose_unit, e, form))


def _choose_unit(e: Emitter, form: Form, unit: Unit) -> None:
    b = e.b
    scores = e.offset(unit.scratch, const(form.offsets["end"]))
    row_bytes = b.mul(e.arg["scores_stride"], const(4))
    last = b.sub(unit.end, const(1))
    with b.if_then(b.icmp_signed(">", _scored(e, last), const(0))):
        _score_unit(e, form, unit, scores, row_bytes)
    with e.for_range(0, unit.rows) as row:
        token, head = b.udiv(row, const(form.group)), b.urem(row, const(form.group))
        position = b.add(b.sub(unit.end, unit.count), token)
        target = _target(e, b.add(unit.first, token), head)
        _choose(e, e.offset(scores, b.mul(row, row_bytes)), position, target)


def _score_unit(e: Emitter, form: Form, unit: Unit, scores: Value, row_bytes: Value) -> None:
    """scores[row][block] of all rows of a unit."""
    b, size = e.b, const(e.spec["index_block"])
    pages = Pages(e, const(0), form.block, 1)
    unit.pack_queries()
    with e.for_range(0, unit.end, form.keys) as start:
        with e.for_range(start, e.minimum(unit.end, b.add(start, const(form.keys)))) as position:
            row = pages.row(position, const(0))
            source = e.at(e.arg["cache"], b.mul(row, const(form.key)), I16)
            key = unit.part("keys", b.sub(position, start), form.key_words)
            copy_key(e, form, source, form.key, key, 0, ways=2)
        is_first = b.icmp_signed("==", b.urem(start, size), const(0))
        with e.for_range(0, unit.panels) as panel:
            count = e.minimum(
                b.sub(b.add(unit.last_position(panel), const(1)), start), const(form.keys)
            )
            with b.if_then(b.icmp_signed(">", count, const(0))):
                whole = b.sub(b.add(start, const(form.keys)), const(1))
                hidden = b.icmp_signed(">", whole, unit.first_position(panel))
                score(e, unit, panel, start, count, hidden)
                state = unit.part("states", panel, form.state_words)
                with e.for_range(0, form.panel) as lane:
                    row = b.add(b.mul(panel, const(form.panel)), lane)
                    target = e.offset(scores, b.mul(row, row_bytes))
                    block = b.udiv(start, size)
                    value = e.load(state, b.add(const(TILE_MAXIMUM * form.panel), lane), F32)
                    old = b.select(is_first, fconst(NEVER), e.load(target, block, F32))
                    more = b.fcmp_ordered(">", value, old)
                    e.store(b.select(more, value, old), target, block)
