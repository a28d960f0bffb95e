"""Kernel: the experts of every row and their weights, with the order of scores and the ties of
codegen/kernels/routing/route.py, in which its cases are told.
"""

from __future__ import annotations

from typing import Any

tl: Any = None


def ordered(value):
    """i32 ordered as f32 values are: NaN as -inf, both zeros equal, all above -2^31."""
    value = tl.where(value == value, value, -float("inf")) + 0.0
    bits = value.to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def ranked(key, number):
    """i64 by which larger keys come first, and of equals the lower number. All are different, and
    above -2^63."""
    return (key.to(tl.int64) << 32) | (0x7FFFFFFF - number).to(tl.int64)


def number_of(rank):
    """The number in what `ranked` made."""
    return (0x7FFFFFFF - (rank & 0x7FFFFFFF)).to(tl.int32)


def route(logits, bias, scale, ids, routing, experts, factor, eps, jitter, stride,
          TOP_K: tl.constexpr, SCORING: tl.constexpr, NORMALISE: tl.constexpr, BIAS: tl.constexpr,
          SCALED: tl.constexpr, GROUPS: tl.constexpr, SIZE: tl.constexpr, KEPT: tl.constexpr,
          BEST: tl.constexpr, HIGH: tl.constexpr, WIDE: tl.constexpr,
          CHOSEN: tl.constexpr):  # fmt: skip
    """ids i32 and routing f32 [tokens, TOP_K], best first, of logits [tokens, experts].

    SCORING 0: softmax, 1: sigmoid, 2: softmax of those chosen, 3: their sigmoid, 4: SparseMixer,
    5: sqrt(softplus).
    With KEPT only the experts of the KEPT best of GROUPS groups of SIZE are chosen from, by the
    BEST one or two of each; else there is one group. HIGH, WIDE and CHOSEN are GROUPS, SIZE and
    TOP_K as powers of two. Programs: tokens.
    """
    token = tl.program_id(0).to(tl.int64)
    group, place = tl.arange(0, HIGH)[:, None], tl.arange(0, WIDE)[None, :]
    expert = group * SIZE + place
    known = (group < GROUPS) & (place < SIZE)
    logit = tl.load(logits + token * stride + expert, known, -float("inf")).to(tl.float32)
    score = logit
    if SCORING == 0:
        score = tl.exp(logit - tl.max(tl.max(logit, 1), 0))
        score = score / tl.sum(tl.sum(score, 1), 0)
    elif SCORING == 1:
        score = 1.0 / (1.0 + tl.exp(-logit))
    elif SCORING == 5:
        small = tl.exp(-tl.abs(logit))
        above = 1.0 + small
        lost = above == 1.0  # Kahan's log1p
        more = tl.where(lost, small, tl.log(above) * small / tl.where(lost, 1.0, above - 1.0))
        score = tl.sqrt(tl.maximum(logit, 0.0) + more)
    choice = score
    if BIAS:
        choice = score + tl.load(bias + expert, known, 0.0).to(tl.float32)

    never: tl.constexpr = -(2**63)
    key = ordered(choice)
    if KEPT:
        # NaN is a group's best, and makes its sum NaN
        first = tl.where(choice == choice, key, 0x7FFFFFFF)
        within = tl.where(known, ranked(first, place), never)
        leader = tl.max(within, 1)
        worth = value_of(leader)
        if BEST == 2:
            second = tl.max(tl.where(within == leader[:, None], never, within), 1)
            worth += value_of(second)
        worth = ordered(worth)
        number = tl.arange(0, HIGH)
        groups = tl.where(number < GROUPS, ranked(worth, number), never)
        kept = number < 0
        for _ in tl.static_range(KEPT):
            taken = groups == tl.max(groups, 0)
            kept = kept | taken
            groups = tl.where(taken, never, groups)
        key = tl.where(kept[:, None], key, -(2**31))

    rank = tl.where(known, ranked(key, expert), never)
    slot = tl.arange(0, CHOSEN)
    weight = tl.full((CHOSEN,), -float("inf"), tl.float32)
    found = tl.full((CHOSEN,), 0, tl.int32)
    for i in range(TOP_K):
        best = tl.max(tl.max(rank, 1), 0)
        own = rank == best
        mine = tl.sum(tl.sum(tl.where(own, score, 0.0), 1), 0)
        if SCORING == 4:
            most = tl.max(tl.max(score, 1), 0)
            size = tl.maximum(tl.abs(score), most)
            far = ((most - score) / size > 2.0 * jitter) | (score == -float("inf"))
            share = tl.where(far, 0.0, tl.exp(score - most))
            mine = tl.exp(mine - most) / tl.sum(tl.sum(share, 1), 0)
            score = tl.where(own, -float("inf"), score)
        weight = tl.where(slot == i, mine, weight)
        found = tl.where(slot == i, number_of(best), found)
        rank = tl.where(own, never, rank)
    if SCORING == 2:
        weight = tl.exp(weight - tl.max(weight, 0))
        weight = weight / tl.sum(tl.where(slot < TOP_K, weight, 0.0), 0)
    if SCORING == 3:
        weight = 1.0 / (1.0 + tl.exp(-weight))
    if NORMALISE:
        weight = weight / (tl.sum(tl.where(slot < TOP_K, weight, 0.0), 0) + eps)
    weight *= factor
    if SCALED:
        weight *= tl.load(scale + found, slot < TOP_K, 0.0).to(tl.float32)
    tl.store(ids + token * TOP_K + slot, found, slot < TOP_K)
    tl.store(routing + token * TOP_K + slot, weight, slot < TOP_K)


def value_of(rank):
    """f32 whose `ordered` key is in a rank; NaN for the key above all."""
    key = (rank >> 32).to(tl.int32)
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
