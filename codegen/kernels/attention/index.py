"""The indexer of sparse attention: scores of every position that a token sees, and the best ones.

    index_append, index_scores, index_choose     few tokens, with barriers between
    index_append, index_prefill                  many: both for one token after the other

Scores have heads in the lanes: a key element is broadcast, the queries are transposed once a token,
and what is summed up over a head's elements is rectified, weighed and added to the other heads'.
Queries are rounded to bf16 on every tier, as keys are, so that tiers choose alike. Work is shared
by (token, page); a sum is taken in the same order whoever makes it.

The best are found by choose.py. Tokens that see no more than can be chosen need no scores.
"""

from __future__ import annotations

from math import gcd

from hmc.codegen.ir import F32, I32, Emitter, Value, const, vec
from hmc.codegen.kernels.attention.attend_rows import Multiplies, Pages
from hmc.codegen.kernels.attention.attention import Appended, append
from hmc.codegen.kernels.attention.choose import ALIGN, choose, share_pieces
from hmc.codegen.ragged import ceil_div
from hmc.codegen.vector import copy_row, fmax, fsplat

_VECTORS = 4
"""Vectors of heads whose products are summed up at once."""


def scores_stride(block: int, max_context: int) -> int:
    """Scores that a token has room for, as kernels write them: whole pages and vectors."""
    return -(-(-(-max_context // block) * block) // ALIGN) * ALIGN


def emit_index_append(e: Emitter) -> None:
    """`index_append`: keys."""
    dim = e.spec["dim"]
    append(e, 1, Appended("indexer_k", "cache", dim, dim))


class _Scores:
    """Scores of one token after the other, a page of positions at a time."""

    def __init__(self, e: Emitter) -> None:
        self.e, self.form, spec = e, Multiplies(e.spec.isa), e.spec
        self.heads, self.dim, self.block = spec["heads"], spec["dim"], spec["block"]
        self.steps = self.dim // self.form.step
        self.vectors = min(_VECTORS, -(-self.heads // e.lanes))
        self.together = self.vectors * e.lanes
        self.groups = -(-self.heads // self.together)
        self.tile = gcd(self.block, e.tier.registers // 8)
        words = self.groups * self.steps * self.together
        self._queries = e.buffer(self.form.word, words)
        self._weights = e.buffer(F32, self.groups * self.together)
        self._wide = None if self.form.dot else e.buffer(F32, self.tile * self.dim)
        for target, count in ((self._queries, words), (self._weights, self.groups * self.together)):
            with e.for_range(0, count, e.lanes) as index:  # lanes without a head
                e.store(e.zeros(I32, e.lanes), target, index, align=4 * e.lanes)

    def pack(self, token: Value) -> None:
        """queries[group][step][head], and the heads' weights."""
        e, b = self.e, self.e.b
        step = self.form.step
        with e.for_range(0, self.heads) as head:
            group, lane = b.udiv(head, const(self.together)), b.urem(head, const(self.together))
            source = e.row("q", token, head, self.dim)
            first = b.mul(group, const(self.steps))
            with e.for_range(0, self.dim) as element:
                value = b.load(b.gep(source, [element]))
                at = b.add(first, b.udiv(element, const(step)))
                at = b.add(b.mul(at, const(self.together)), lane)
                value = e.f32_to_bf16(value)
                if self.form.dot:
                    at = b.add(b.mul(at, const(step)), b.urem(element, const(step)))
                else:
                    value = e.bf16_to_f32(value)
                e.store(value, self._queries, at)
            e.store(b.load(e.row("weights", token, head, 1)), self._weights, head)

    def page(self, keys: Value, count: Value, scores: Value) -> None:
        """scores[0 : count] (rounded up to a tile) of the rows from `keys` on."""
        e, b, lanes = self.e, self.e.b, self.e.lanes
        with e.for_range(0, count, self.tile) as start:
            words = e.offset(keys, b.mul(start, const(2 * self.dim)))
            if self._wide is not None:
                copy_row(e, "bf16", words, "f32", self._wide, self.tile * self.dim)
                words = self._wide
            totals = [e.local(vec(F32, lanes), e.zeros(F32, lanes)) for _ in range(self.tile)]
            with e.for_range(0, self.groups) as group:
                sums = self._products(words, b.mul(group, const(self.steps)))
                for vector in range(self.vectors):
                    at = b.add(b.mul(group, const(self.together)), const(vector * lanes))
                    weight = e.load_vec(self._weights, at, F32, lanes, align=4 * lanes)
                    for total, found in zip(totals, sums, strict=True):
                        positive = fmax(e, b.load(found[vector]), fsplat(0.0, lanes))
                        b.store(e.fma(positive, weight, b.load(total)), total)
            for row, total in enumerate(totals):
                e.store(e.reduce_add(b.load(total)), scores, b.add(start, const(row)))

    def _products(self, words: Value, first: Value) -> list[list[Value]]:
        """Sums [row of the tile][vector of heads] of a group; its queries are at step `first`."""
        e, b, lanes, form = self.e, self.e.b, self.e.lanes, self.form
        kind = vec(F32, lanes)
        sums = [
            [e.local(kind, e.zeros(F32, lanes)) for _ in range(self.vectors)]
            for _ in range(self.tile)
        ]
        with e.for_range(0, self.steps) as step:
            at = b.mul(b.add(first, step), const(self.together))
            queries = [
                e.load_vec(
                    self._queries, b.add(at, const(v * lanes)), form.word, lanes, align=4 * lanes
                )
                for v in range(self.vectors)
            ]
            for row, slots in enumerate(sums):
                one = e.load(words, b.add(step, const(row * self.steps)), form.word)
                one = e.splat(one, lanes)
                for slot, query in zip(slots, queries, strict=True):
                    b.store(form.multiply_add(e, b.load(slot), query, one), slot)
        return sums


def _scored(e: Emitter, token: Value) -> Value:
    """Positions of a token that are scored: all up to its own, or 0 where all are chosen."""
    b = e.b
    end = b.add(e.load_int(e.arg["positions"], token), const(1))
    return b.select(b.icmp_signed(">", end, const(e.spec["index_topk"])), end, const(0))


def emit_index_scores(e: Emitter) -> None:
    """`index_scores`: split by (token, page)."""
    b, block = e.b, e.spec["block"]
    made = _Scores(e)

    def pages(token: Value) -> Value:
        return ceil_div(e, _scored(e, token), const(block))

    def score(token: Value, low: Value, high: Value) -> None:
        made.pack(token)
        rows, end = Pages(e, token, block, 1), _scored(e, token)
        with e.for_range(low, high) as page:
            position = b.mul(page, const(block))
            row = b.mul(rows.row(position, const(0)), const(2 * made.dim))
            inside = e.minimum(b.sub(end, position), const(block))
            made.page(e.offset(e.arg["cache"], row), inside, _row_of(e, token, position))

    share_pieces(e, pages, score)


def _row_of(e: Emitter, token: Value, position: Value) -> Value:
    """Address of a score."""
    at = e.b.add(e.b.mul(token, e.arg["scores_stride"]), position)
    return e.at(e.arg["scores"], at, F32)


def emit_index_choose(e: Emitter) -> None:
    """`index_choose`: split by token. Scores are overwritten."""
    start, stop = e.split(e.arg["tokens"])
    with e.for_range(start, stop) as token:
        end = e.positive(e.b.add(e.load_int(e.arg["positions"], token), const(1)))
        target = e.row("chosen", token, element=I32)
        choose(e, _row_of(e, token, const(0)), end, e.spec["index_topk"], target)


def emit_index_prefill(e: Emitter) -> None:
    """`index_prefill`: a worker takes every so manieth token."""
    b = e.b
    size = b.mul(e.arg["scores_stride"], const(4))
    own = {"scores": e.offset(e.arg["scratch"], b.mul(e.worker, size)), "tokens": const(1)}
    with e.for_range(e.worker, e.arg["tokens"], e.workers) as token:
        rows = {
            name: e.offset(e.arg[name], b.mul(token, stride))
            for name, stride in (
                ("q", b.mul(e.arg["q_stride"], const(4))),
                ("weights", b.mul(e.arg["weights_stride"], const(4))),
                ("chosen", b.mul(e.arg["chosen_stride"], const(4))),
                ("sequence", const(4)),
                ("positions", const(4)),
            )
        }
        with e.alone(**own, **rows):
            emit_index_scores(e)
            emit_index_choose(e)
