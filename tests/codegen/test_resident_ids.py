"""`resident_ids` against numpy, for any number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import address, filled, guarded, in_turn
from kernel_meanings import resident_ids
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("experts", "top_k"), [(20, 3), (128, 8), (7, 1)])
def test_against_numpy(jit: Jit, isa: str, experts: int, top_k: int) -> None:
    need(isa)
    rng = np.random.default_rng(experts)
    spec = KernelSpec.of("resident_ids", isa, top_k=top_k)
    mask = guarded(rng.integers(0, 2, experts, np.int32))
    for tokens, workers in [(1, 1), (1, 3), (16, 2), (33, 9)]:
        ids = guarded(rng.integers(0, experts, (tokens, top_k), np.int32))
        out = filled((tokens, top_k), np.int32)
        in_turn(
            jit, spec, workers,
            ids=address(ids), mask=address(mask), out=address(out), tokens=tokens,
        )  # fmt: skip
        np.testing.assert_array_equal(out, resident_ids(ids, mask))
