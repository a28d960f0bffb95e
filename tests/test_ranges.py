"""Texts of whole numbers: printed and read back, and what is none."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hmc.errors import VerifyError
from hmc.ranges import expert_ranges, parse, ranges


@pytest.mark.parametrize(
    ("numbers", "text"), [([], ""), ([3], "3"), ([0, 1, 2, 5], "0-2,5"), ([2, 1, 0], "0-2")]
)
def test_ranges(numbers: list[int], text: str) -> None:
    assert ranges(numbers) == text


@given(st.sets(st.integers(0, 5000)))
def test_what_is_printed_is_read(numbers: set[int]) -> None:
    assert parse(ranges(numbers)) == sorted(numbers)


@pytest.mark.parametrize("text", ["a", "1-", "-1", "1--2", "+1", "1 2", "3-1", "0-99999999", "²"])
def test_what_is_no_list(text: str) -> None:
    with pytest.raises(ValueError, match="range"):
        parse(text)
    with pytest.raises(VerifyError, match="placement: "):
        expert_ranges(text)
