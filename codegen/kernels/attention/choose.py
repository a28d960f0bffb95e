"""The best of a row of scores, exactly and without sorting: what sparse attention chooses; and how
workers share the scoring.

Scores become whole numbers of the same order (NaN below all others). The least one that is chosen
is built from its highest bit down, by counting; then one walk takes what is above it and, of what
equals it, the first.
"""

from __future__ import annotations

from collections.abc import Callable

from hmc.codegen.ir import F32, I32, I64, Emitter, Value, const, lanes_mask
from hmc.codegen.kernels.routing.route import ordered_key
from hmc.codegen.kernels.routing.threshold import LEAST, reaching, threshold
from hmc.codegen.ragged import ceil_div
from hmc.codegen.vector import isplat

ALIGN = 64
"""Scores that are whole vectors on every tier: what a row has room for is a multiple of it."""


def share_pieces(
    e: Emitter, count: Callable[[Value], Value], work: Callable[[Value, Value, Value], None]
) -> None:
    """Split what there is to score: of each token `count(token)` pieces, of which a worker does
    `work(token, first, last)`.
    """
    b = e.b
    total, before = e.local(I64, const(0)), e.local(I64, const(0))
    with e.for_range(0, e.arg["tokens"]) as token:
        b.store(b.add(b.load(total), count(token)), total)
    start, stop = e.split(b.load(total))
    with e.for_range(0, e.arg["tokens"]) as token:
        pieces, passed = count(token), b.load(before)
        low, high = e.positive(b.sub(start, passed)), e.minimum(b.sub(stop, passed), pieces)
        b.store(b.add(passed, pieces), before)
        with b.if_then(b.icmp_signed("<", low, high)):
            work(token, low, high)


def choose(e: Emitter, scores: Value, count: Value, most: int, target: Value) -> None:
    """target i32 [most] = indices of the `most` largest of `scores` f32 [count], of equal ones the
    lower, ascending. All of them, then -1, where there are no more; scores are not read then. They
    are overwritten otherwise, up to whole vectors.
    """
    b = e.b
    with b.if_else(b.icmp_signed(">", count, const(most))) as (some, every):
        with some:
            padded = _order(e, scores, count)
            least = threshold(e, scores, padded, const(most))
            _take(e, scores, padded, least, most, target)
        with every:
            with e.for_range(0, count) as index:
                e.store_int(index, target, index)
            with e.for_range(count, most) as index:
                e.store_int(const(-1), target, index)


def _order(e: Emitter, scores: Value, count: Value) -> Value:
    """Scores become numbers, with the least of all behind the last; how many there are then."""
    b, lanes = e.b, e.lanes
    padded = b.mul(ceil_div(e, count, const(lanes)), const(lanes))
    numbers = lanes_mask(list(range(lanes)))
    with e.for_range(0, padded, lanes) as index:
        key = ordered_key(e, e.load_vec(scores, index, F32, lanes))
        place = b.add(e.splat(b.trunc(index, I32), lanes), numbers)
        inside = b.icmp_signed("<", place, e.splat(b.trunc(count, I32), lanes))
        e.store(b.select(inside, key, isplat(LEAST, lanes)), scores, index)
    return padded


def _take(e: Emitter, keys: Value, padded: Value, least: Value, most: int, target: Value) -> None:
    """target[:] = indices of keys above `least`, and of the first that equal it."""
    b, lanes = e.b, e.lanes
    above = _above(e, keys, padded, least)
    taken, rest = e.local(I64, const(0)), e.local(I64, b.sub(const(most), above))
    highest = f"llvm.vector.reduce.smax.v{lanes}i32"
    with e.for_range(0, padded, lanes) as start:
        top = b.sext(e.call(highest, I32, e.load_vec(keys, start, I32, lanes)), I64)
        with (
            b.if_then(b.icmp_signed(">=", top, least)),
            e.for_range(start, b.add(start, const(lanes))) as index,
        ):
            key, left = e.load_int(keys, index), b.load(rest)
            equal = b.and_(b.icmp_signed("==", key, least), b.icmp_signed(">", left, const(0)))
            with b.if_then(b.or_(b.icmp_signed(">", key, least), equal)):
                number = b.load(taken)
                e.store_int(index, target, number)
                b.store(b.add(number, const(1)), taken)
            b.store(b.sub(left, b.zext(equal, I64)), rest)


def _above(e: Emitter, keys: Value, padded: Value, least: Value) -> Value:
    """How many are larger; none where `least` is the largest number that there is."""
    b, last = e.b, const(-LEAST - 1)
    is_last = b.icmp_signed("==", least, last)
    bound = b.select(is_last, last, b.add(least, const(1)))
    return b.select(is_last, const(0), reaching(e, keys, padded, bound))
