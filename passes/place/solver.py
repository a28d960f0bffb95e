"""Chooses which experts live on which GPU: a knapsack with one budget a GPU, solved by density and,
where there are few enough items, exactly. Hides the search.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

EXACT_ITEMS = 20
"""Up to so many items the search is exhaustive (with bounds); beyond, items of equal size make the
greedy choice optimal, and others leave it less than one item a GPU below the bound."""


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
    greedy = _greedy(items, budgets)
    bound = upper_bound(items, budgets)
    best = _gain(items, greedy)
    if len(items) <= EXACT_ITEMS and best < bound:
        greedy = _search(items, budgets, greedy)
    return Assignment(tuple(greedy), _gain(items, greedy), bound)


def upper_bound(items: Sequence[Item], budgets: Sequence[int]) -> float:
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


def _gain(items: Sequence[Item], homes: Sequence[int]) -> float:
    return sum(item.gains[home] for item, home in zip(items, homes, strict=True) if home >= 0)


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


def _search(items: Sequence[Item], budgets: Sequence[int], first: list[int]) -> list[int]:
    """Branch and bound over the items by density; `first` is the incumbent."""
    order = sorted(range(len(items)), key=lambda i: -max(items[i].gains) / items[i].bytes)
    best, best_gain = list(first), _gain(items, first)
    homes = [-1] * len(items)
    left = list(budgets)

    def visit(depth: int, gain: float) -> None:
        nonlocal best, best_gain
        if gain > best_gain:
            best, best_gain = list(homes), gain
        if depth == len(order):
            return
        if gain + upper_bound([items[i] for i in order[depth:]], left) <= best_gain:
            return
        item = items[order[depth]]
        tried = set()
        for gpu in sorted(range(len(left)), key=lambda g: -item.gains[g]):
            alike = (left[gpu], tuple(each.gains[gpu] for each in items))
            if item.gains[gpu] <= 0 or item.bytes > left[gpu] or alike in tried:
                continue
            tried.add(alike)
            homes[order[depth]] = gpu
            left[gpu] -= item.bytes
            visit(depth + 1, gain + item.gains[gpu])
            left[gpu] += item.bytes
            homes[order[depth]] = -1
        visit(depth + 1, gain)

    visit(0, 0.0)
    return best
