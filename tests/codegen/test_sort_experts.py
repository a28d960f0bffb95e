"""`sort_experts` against numpy: stable, the same for any number of workers, negative ids left
out.
"""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import address, filled, guarded, in_turn
from kernel_meanings import sort_experts
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.spec import KernelSpec


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize(("experts", "top_k"), [(20, 3), (128, 8), (7, 1), (512, 22)])
def test_against_numpy(jit: Jit, isa: str, experts: int, top_k: int) -> None:
    need(isa)
    rng = np.random.default_rng(experts)
    spec = KernelSpec.of("sort_experts", isa, top_k=top_k, experts=experts)
    for tokens, workers, lowest in [(1, 1, 0), (40, 1, 0), (40, 3, -1), (33, 9, -5), (4, 2, -90)]:
        ids = guarded(np.maximum(rng.integers(lowest, experts, (tokens, top_k), np.int32), -1))
        slots, offsets = filled((tokens * top_k,), np.int32), filled((experts + 1,), np.int32)
        in_turn(
            jit, spec, workers,
            ids=address(ids), slots=address(slots), offsets=address(offsets), tokens=tokens,
        )  # fmt: skip
        wanted, edges = sort_experts(ids, experts)
        np.testing.assert_array_equal(offsets, edges)
        np.testing.assert_array_equal(slots[: len(wanted)], wanted)
        assert (slots[len(wanted) :] == 77).all()


def test_the_reference_is_a_stable_sort() -> None:
    slots, offsets = sort_experts(np.array([[2, 0], [0, -1], [2, 1]]), 4)
    assert slots.tolist() == [1, 2, 5, 0, 4]
    assert offsets.tolist() == [0, 2, 3, 5, 5]
