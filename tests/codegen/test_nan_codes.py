"""`nan_codes`: every position of a span is looked at, nothing outside of it, for any number of
workers.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import address, filled, guarded, in_turn
from kernel_meanings import nan_codes
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec


@pytest.mark.parametrize("isa", TIERS)
def test_every_position_counts(jit: Jit, isa: str) -> None:
    need(isa)
    spec = KernelSpec.of("nan_codes", isa)
    rng = np.random.default_rng(5)
    codes = rng.integers(0, 256, 700, np.uint8)
    codes[codes & 0x7F == 0x7F] = 0x7E
    spans = [codes[start : start + size] for start, size in [(0, 700), (3, 600), (9, 1), (50, 0)]]
    # One more span for each place that a NaN can have, which lies between two codes that are none.
    for place in range(300):
        spoilt = codes[:300].copy()
        spoilt[place] = 0x7F if place % 2 else 0xFF
        spans.append(spoilt)
        if place < 299:
            spans.append(spoilt[place + 1 :])
        spans.append(spoilt[:place])
    table = guarded(np.array([(address(span), len(span)) for span in spans], np.int64))
    expected = nan_codes(spans)
    assert expected.sum() == 300
    for workers in (1, 3):
        found = filled((len(spans),), np.int64)
        in_turn(
            jit, spec, workers, spans=address(table), count=len(spans), found=address(found)
        )  # fmt: skip
        np.testing.assert_array_equal(found, expected)
