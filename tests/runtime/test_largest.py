"""Selection of the largest against sorting everything."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hmc.runtime.tokens.largest import largest, nucleus


def by_sorting(values, count):
    order = np.argsort(-values, kind="stable")
    order = order[values[order] > -np.inf]
    if count >= len(order):
        return np.sort(order)
    return np.flatnonzero(values >= values[order[count - 1]])


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.sampled_from([1, 5, 63, 64, 65, 4000, 20_011]),
    count=st.sampled_from([1, 2, 20, 60, 300, 5000, 10**6]),
    levels=st.sampled_from([1, 3, 50, 10**7]),
    masked=st.sampled_from([0.0, 0.5, 0.999]),
    dtype=st.sampled_from([np.float32, np.float64]),
)
def test_largest_agrees_with_sorting(seed, size, count, levels, masked, dtype):
    random = np.random.default_rng(seed)
    values = (random.integers(0, levels, size) / 7 - 1).astype(dtype)
    values[random.random(size) < masked] = -np.inf
    np.testing.assert_array_equal(largest(values, count), by_sorting(values, count))


def test_largest_of_nothing_but_masked():
    assert largest(np.full(9000, -np.inf, np.float32), 5).size == 0


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 999),
    size=st.sampled_from([1, 2, 255, 257, 9001, 60_000]),
    share=st.floats(0.01, 0.9999),
    spread=st.floats(0.0, 40.0),
    masked=st.sampled_from([0.0, 0.7]),
)
def test_nucleus_is_the_shortest_run_of_the_heaviest(seed, size, share, spread, masked):
    random = np.random.default_rng(seed)
    weights = np.exp(-spread * random.random(size))
    weights[random.random(size) < masked] = 0
    weights[random.integers(size)] = 1
    chosen = nucleus(weights, share)
    order = np.argsort(-weights, kind="stable")
    total = weights.sum()
    assert set(chosen) == set(order[: len(chosen)])
    assert weights[chosen].sum() >= share * total * (1 - 1e-12)
    assert weights[order[: len(chosen) - 1]].sum() < share * total * (1 + 1e-12)


@pytest.mark.parametrize("size", [10, 2000, 70_000])
def test_of_equal_weights_the_first_are_in_the_nucleus(size):
    assert sorted(nucleus(np.ones(size), 0.25)) == list(range(-(-size // 4)))


def test_nucleus_where_the_guess_misses():
    """The weights looked at for the guess are not like the others."""
    weights = np.full(60_000, 1e-3)
    weights[::127] = 1e-9
    for share in (0.1, 0.9, 1 - 2**-53):
        chosen = np.sort(nucleus(weights, share))
        heavy = np.flatnonzero(weights > 1e-6)
        if share < 0.95:
            target = share * weights.sum()
            np.testing.assert_array_equal(chosen, heavy[: round(np.ceil(target / 1e-3 - 1e-6))])
        else:
            assert set(heavy) < set(chosen)
