"""The largest of 10^5 numbers, in a pass or two over them; hides how the few candidates are found.

Sorting or partitioning a whole vocabulary takes a millisecond; here a cheap bound first throws away
nearly all of it, and only what is left is partitioned.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Reals = npt.NDArray[np.floating[Any]]
Ids = npt.NDArray[np.int64]

_LANE = 64  # numbers of which only the largest is looked at for the bound
_STRIDE = 127  # of weights looked at for a guess; odd, for the sake of the caches
_BINS = 11  # bits: bins of a histogram
_SORTED = 256  # weights from which a histogram is quicker than a sort


def largest(values: Reals, count: int) -> Ids:
    """Positions of the `count` largest of f32 or f64 values [n] and of those that tie with the last
    of these, ascending; -inf is never among them. `values` holds no NaN.
    """
    # At least `count` values reach the count-th largest of the lanes' maxima, so that this is at
    # most the count-th largest of all.
    bound = np.finfo(values.dtype).min
    lanes = len(values) // _LANE
    if 0 < count <= lanes:
        tops = values[: lanes * _LANE].reshape(_LANE, lanes).max(axis=0)
        bound = max(bound, np.partition(tops, -count)[-count])
    ids = np.flatnonzero(values >= bound)
    if count >= len(ids):
        return ids
    pool = values[ids]
    return ids[pool >= np.partition(pool, -count)[-count]] if count else ids[:0]


def nucleus(weights: npt.NDArray[np.float64], share: float) -> Ids:
    """Positions of the fewest weights whose sum is at least `share` (0 < share < 1) of all, in no
    order; of equal weights the first are taken. f64 weights [n], finite, none negative, one
    positive.
    """
    total = float(weights.sum())
    target = share * total
    # The heaviest weights that together reach the target hold the answer, however they were found.
    rest = np.flatnonzero(weights >= _guess(weights, total - target))
    if weights[rest].sum() < target:
        # What is lighter than the mean of the tail's share sums to less than that share: it stays
        # out. Half of it leaves room for rounding.
        rest = np.flatnonzero(weights >= (total - target) / len(weights) / 2)
    if weights[rest].sum() < target:  # the share is 1 to rounding
        rest = np.flatnonzero(weights)
    taken, before = [], 0.0
    while len(rest) > _SORTED:
        # The bits of a positive float, read as an integer, order like the float.
        bits = weights[rest].view(np.int64)
        high = bits.max()
        span = int(high - bits.min())
        if span == 0:
            break
        bins = (high - bits) >> max(span.bit_length() - _BINS, 0)
        sums = before + np.cumsum(np.bincount(bins, weights[rest]))
        crossing = int(np.searchsorted(sums, target))
        taken.append(rest[bins < crossing])
        before = float(sums[crossing - 1]) if crossing else before
        rest = rest[bins == crossing]
    rest = rest[np.argsort(-weights[rest], kind="stable")]
    sums = before + np.cumsum(weights[rest])
    taken.append(rest[: int(np.searchsorted(sums, target)) + 1])
    return np.concatenate(taken)


def _guess(weights: npt.NDArray[np.float64], tail: float) -> float:
    """A weight such that the lighter ones probably sum to less than `tail`, as few as are."""
    sample = np.sort(weights[::_STRIDE])
    light = int(np.searchsorted(np.cumsum(sample) * _STRIDE, 0.7 * tail))
    return float(sample[max(light - 1, 0)])
