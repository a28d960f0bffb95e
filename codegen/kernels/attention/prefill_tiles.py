"""Arithmetic of prefill attention: one panel of queries against one tile of keys and values.

Queries lie in the lanes, keys and value dimensions are broadcast: softmax needs no sums across
lanes, keys are used as they lie in the cache, and only pairs of value rows are interleaved. Scores
S[key][query] and results O[dimension][query] are products of the same form, register tiles of
`high` broadcast words by `vectors` vectors of queries.

    dot form   pairs of bf16 through `vdpbf16ps`. Queries enter as `terms` bf16 terms;
               probabilities are rounded to bf16 and their sum is taken over the rounded ones.
    fma form   f32 multiply-add

Softmax is online: m the largest score so far, l the sum of weights 2**(score - m); queries carry
the factor scale * log2(e), so that scores are exponents of 2 (where an expression makes something
of scores, the scale alone). A sink is the first m, with a weight of 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from llvmlite import ir

from hmc.codegen.ir import BF16, F32, I8, I32, I64, Emitter, Value, const, lanes_mask, vec
from hmc.codegen.kernels.attention.options import capped
from hmc.codegen.kernels.attention.prefill_form import Form
from hmc.codegen.vector import dot_pairs, fmax, for_blocks, fsplat, isplat, polynomial

LOWEST = -1e30
"""Below every score and yet finite, so that differences are no NaN."""

_PTR = I8.as_pointer()


POSITION, MAXIMUM, SUM, TILE_MAXIMUM, FACTOR, FIRST = range(6)
LAST = FIRST
"""Fields of a panel's state: FIRST where rows are bounded, LAST where they chose blocks."""


class Tiles:
    """The routines that take a panel through a tile of keys: `scores` or, where some key is not for
    every row, `scores_hidden`; then, unless there are no `results`, `weights` and `values`.
    """

    def __init__(self, e: Emitter, form: Form, *, results: bool = True) -> None:
        self.e, self.form = e, form
        for hidden in (False, True):
            self._emit_scores(hidden)
        if results:
            self._emit_weights()
            self._emit_values()

    def _field(self, state: Value, field: int, vector: int, element: ir.Type = F32) -> Value:
        index = const(field * self.form.panel + vector * self.form.lanes)
        return self.e.load_vec(state, index, element, self.form.lanes, align=4)

    def _set_field(self, value: Value, state: Value, field: int, vector: int) -> None:
        index = const(field * self.form.panel + vector * self.form.lanes)
        self.e.store(value, state, index, align=4)

    # -- scores ------------------------------------------------------------------------------------

    def _emit_scores(self, hidden: bool) -> None:
        """scores(queries, keys, scores, state, start, count): S of the tile and its maxima; with
        `hidden` keys, those behind the last that a row sees, or before the first, get -inf.
        """
        e, form = self.e, self.form
        name = "scores_hidden" if hidden else "scores"
        with e.subroutine(name, *[_PTR] * 4, I64, I64) as values:
            queries, keys, scores, state, start, count = values
            b, lanes = e.b, form.lanes
            kind = vec(F32, lanes)
            best = [e.local(kind, fsplat(LOWEST, lanes)) for _ in range(form.vectors)]
            last = LAST if form.chosen else POSITION
            seen = [self._field(state, last, v, I32) for v in range(form.vectors)]
            if form.bounded:
                low = [self._field(state, FIRST, v, I32) for v in range(form.vectors)]
            with e.for_range(0, count, form.high) as key:
                base = e.offset(keys, b.mul(key, const(4 * form.key_words)))

                def start_zero(h: int, v: int) -> Value:
                    return e.zeros(F32, lanes)

                sums = self._product(
                    start_zero,
                    const(form.key_words),
                    (queries, form.terms, form.query_steps * form.panel),
                    (base, form.key_words, 1),
                    form.high,
                    math.gcd(form.key_words, 4),
                )
                target = e.offset(scores, b.mul(key, const(4 * form.panel)))
                for h in range(form.high):
                    position = b.trunc(b.add(b.add(start, key), const(h)), I32)
                    for v in range(form.vectors):
                        score = b.load(sums[h][v])
                        if e.spec.expr:
                            score = b.fmul(capped(e, score), fsplat(math.log2(math.e), lanes))
                        if hidden:
                            is_seen = b.icmp_signed(">=", seen[v], e.splat(position, lanes))
                            if form.bounded:
                                near = b.icmp_signed("<=", low[v], e.splat(position, lanes))
                                is_seen = b.and_(is_seen, near)
                            score = b.select(is_seen, score, fsplat(-math.inf, lanes))
                        e.store(score, target, const(h * form.panel + v * lanes), align=4)
                        b.store(fmax(e, score, b.load(best[v])), best[v])
            for v in range(form.vectors):
                self._set_field(b.load(best[v]), state, TILE_MAXIMUM, v)

    # -- softmax -----------------------------------------------------------------------------------

    def _emit_weights(self) -> None:
        """weights(scores, state, count): scores become weights in place, pairs of keys in the dot
        form; m, l and the factor for what was summed before are brought up to date.
        """
        e, form = self.e, self.form
        with e.subroutine("weights", _PTR, _PTR, I64) as (scores, state, count):
            b, lanes, panel = e.b, form.lanes, form.panel
            tops, sums = [], []
            for v in range(form.vectors):
                old = self._field(state, MAXIMUM, v)
                top = fmax(e, self._field(state, TILE_MAXIMUM, v), old)
                factor = _exp2(e, b.fsub(old, top), form.dot)
                self._set_field(top, state, MAXIMUM, v)
                self._set_field(factor, state, FACTOR, v)
                tops.append(top)
                sums.append(e.local(vec(F32, lanes), b.fmul(self._field(state, SUM, v), factor)))
            with e.for_range(0, count, form.step) as key:
                source = e.offset(scores, b.mul(key, const(4 * panel)))
                target = e.offset(scores, b.mul(b.udiv(key, const(form.step)), const(4 * panel)))
                for v in range(form.vectors):
                    weights = []
                    for row in range(form.step):
                        at = const(row * panel + v * lanes)
                        score = e.load_vec(source, at, F32, lanes, align=4)
                        weights.append(_exp2(e, b.fsub(score, tops[v]), form.dot))
                    if form.dot:
                        word = bf16_pair(e, *weights)
                        total = dot_pairs(e, b.load(sums[v]), word, isplat(0x3F803F80, lanes))
                    else:
                        (word,) = weights
                        total = b.fadd(b.load(sums[v]), word)
                    b.store(total, sums[v])
                    e.store(word, target, const(v * lanes), align=4)
            for v in range(form.vectors):
                self._set_field(b.load(sums[v]), state, SUM, v)

    # -- results -----------------------------------------------------------------------------------

    def _emit_values(self) -> None:
        """values(weights, values, results, state, count): O = O * factor + weights x values."""
        e, form = self.e, self.form
        with e.subroutine("values", *[_PTR] * 4, I64) as (weights, values, results, state, count):
            b = e.b
            factors = [self._field(state, FACTOR, v) for v in range(form.vectors)]
            steps = b.udiv(b.add(count, const(form.step - 1)), const(form.step))

            def columns(column: Value, high: int) -> None:
                target = e.offset(results, b.mul(column, const(4 * form.panel)))

                def index(h: int, v: int) -> Value:
                    return const(h * form.panel + v * form.lanes)

                def rescaled(h: int, v: int) -> Value:
                    old = e.load_vec(target, index(h, v), F32, form.lanes, align=4)
                    return b.fmul(old, factors[v])

                sums = self._product(
                    rescaled,
                    steps,
                    (weights, 1, 0),
                    (e.offset(values, b.mul(column, const(4))), 1, form.value),
                    high,
                    1,
                )
                for h in range(high):
                    for v in range(form.vectors):
                        e.store(b.load(sums[h][v]), target, index(h, v), align=4)

            for_blocks(e, form.value, form.high, columns)

    # -- the product -------------------------------------------------------------------------------

    def _product(
        self,
        initial: Callable[[int, int], Value],
        steps: Value,
        lanes_side: tuple[Value, int, int],
        broadcast_side: tuple[Value, int, int],
        high: int,
        unroll: int,
    ) -> list[list[Value]]:
        """Sums [high][vector] over `steps` (a multiple of `unroll`) of lane vectors x words.

        `lanes_side`: address of [step][row], its terms, and words from one term to the next.
        `broadcast_side`: address, words from one of `high` to the next, words from step to step.
        """
        e, b, form = self.e, self.e.b, self.form
        vectors, terms, apart = lanes_side
        words, between, stride = broadcast_side
        sums = [
            [e.local(vec(F32, form.lanes), initial(h, v)) for v in range(form.vectors)]
            for h in range(high)
        ]
        with e.for_range(0, steps, unroll) as step:
            here = e.offset(vectors, b.mul(step, const(4 * form.panel)))
            there = e.offset(words, b.mul(step, const(4 * stride)))

            def queries(at: int) -> list[Value]:
                cut = (const(at + v * form.lanes) for v in range(form.vectors))
                return [e.load_vec(here, one, form.word, form.lanes, align=4) for one in cut]

            for u in range(unroll):
                loaded = [queries(term * apart + u * form.panel) for term in range(terms)]
                for h in range(high):
                    at = const(h * between + u * stride)
                    one = e.splat(e.load(there, at, form.word, align=4), form.lanes)
                    for v in range(form.vectors):
                        total = b.load(sums[h][v])
                        for term in loaded:
                            total = form.multiply_add(e, total, term[v], one)
                        b.store(total, sums[h][v])
        return sums


_ROUND = 1.5 * 2.0**23  # adding it leaves round(x) in the low mantissa bits


def _exp2(e: Emitter, x: Value, coarse: bool) -> Value:
    """2**x for x <= 0, exactly 0 from -127 down; NaN stays NaN.

    2**(x - round(x)) by its Taylor polynomial: relative error 6e-9, or 5e-5 if `coarse` (a 40th
    of what rounding to bf16 adds); round(x) is added to the exponent, which makes 0 of -127.
    """
    b, count = e.b, x.type.count
    x = fmax(e, fsplat(-127.0, count), x)
    shifted = b.fadd(x, fsplat(_ROUND, count))
    r = b.fsub(x, b.fsub(shifted, fsplat(_ROUND, count)))
    powers = range(4 if coarse else 7, -1, -1)
    total = polynomial(e, r, *(math.log(2) ** n / math.factorial(n) for n in powers))
    exponent = b.shl(b.bitcast(shifted, vec(I32, count)), isplat(23, count))
    return b.bitcast(b.add(b.bitcast(total, vec(I32, count)), exponent), x.type)


def bf16_pair(e: Emitter, low: Value, high: Value) -> Value:
    """bf16 pairs (i32 lanes) of two f32 vectors, rounded to nearest even."""
    lanes = low.type.count
    both = e.call("llvm.x86.avx512bf16.cvtne2ps2bf16.512", vec(BF16, 2 * lanes), high, low)
    mixed = [lane // 2 + lane % 2 * lanes for lane in range(2 * lanes)]
    words = e.b.bitcast(both, vec(ir.IntType(16), 2 * lanes))
    return e.b.bitcast(e.b.shuffle_vector(words, words, lanes_mask(mixed)), vec(I32, lanes))
