"""Chooses which experts live on which GPU: a knapsack with one budget a GPU, filled by density. Of
experts of equal size, as those of a model are, that is the best choice; others leave it less than
one expert a GPU below the bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One expert: its bytes, and the seconds a token gains with it on each GPU."""

    layer: int
    expert: int
    bytes: int
    gains: tuple[float, ...]


@dataclass(frozen=True)
class Assignment:
    """`homes[i]` is item i's GPU, or -1: the host. `gain` in seconds a token, `bound` what no
    placement can exceed (the linear relaxation)."""

    homes: tuple[int, ...]
    gain: float
    bound: float


def solve(items: Sequence[Item], budgets: Sequence[int]) -> Assignment:
    """Place items under `budgets` bytes a GPU; equal densities in the order of the items.

    Budgets are never exceeded and every item has one home.
    """
    homes = _greedy(items, budgets)
    gain = sum(item.gains[home] for item, home in zip(items, homes, strict=True) if home >= 0)
    return Assignment(tuple(homes), gain, _upper_bound(items, budgets))


def _upper_bound(items: Sequence[Item], budgets: Sequence[int]) -> float:
    """The linear relaxation, with every item as good as on its best GPU and all budgets in one:
    experts by gain a byte until the budget is full, the last one in part.
    """
    left, total = float(sum(budgets)), 0.0
    for item in sorted(items, key=lambda each: -max(each.gains, default=0.0) / each.bytes):
        gain = max(item.gains, default=0.0)
        if gain <= 0 or left <= 0:
            break
        part = min(1.0, left / item.bytes)
        total += part * gain
        left -= part * item.bytes
    return total


def _greedy(items: Sequence[Item], budgets: Sequence[int]) -> list[int]:
    """By gain a byte over all (item, GPU) pairs, each into what is left."""
    left = list(budgets)
    homes = [-1] * len(items)
    pairs = [
        (-gain / item.bytes, index, gpu)
        for index, item in enumerate(items)
        for gpu, gain in enumerate(item.gains)
        if gain > 0
    ]
    for _, index, gpu in sorted(pairs):
        size = items[index].bytes
        if homes[index] < 0 and size <= left[gpu]:
            homes[index] = gpu
            left[gpu] -= size
    return homes
