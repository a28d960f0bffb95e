"""`argmax_part` and `argmax_join`: exact, ties to the lowest id, whatever the number of workers."""

from __future__ import annotations

import numpy as np
import pytest
from kernel_calls import address, filled, guarded, in_turn
from prefill_data import need

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels.routing.argmax import argmax, argmax_scratch_bytes
from hmc.codegen.spec import KernelSpec


def run(jit: Jit, isa: str, logits: np.ndarray, vocab: int, workers: int) -> np.ndarray:
    """Both records."""
    tokens = len(logits)
    best = filled((tokens,), np.int32)
    scratch = filled((argmax_scratch_bytes(tokens, workers),), np.uint8)
    in_turn(
        jit, KernelSpec.of("argmax_part", isa, vocab=vocab), workers, logits=address(logits),
        logits_stride=logits.shape[1], tokens=tokens, scratch=address(scratch),
    )  # fmt: skip
    in_turn(
        jit, KernelSpec.of("argmax_join", isa, vocab=vocab), workers, scratch=address(scratch),
        best=address(best), tokens=tokens, parts=workers,
    )  # fmt: skip
    return best


@pytest.mark.parametrize("isa", TIERS)
@pytest.mark.parametrize("vocab", [1, 63, 1000, 1024])
def test_argmax(jit: Jit, isa: str, vocab: int) -> None:
    need(isa)
    rng = np.random.default_rng(vocab)
    for tokens in (1, 3, 16):
        # Few distinct values: many ties, also across workers.
        logits = rng.integers(-3, 3, (tokens, vocab)).astype(np.float32)
        logits[0] = -np.inf
        logits[-1, ::3] = np.nan
        logits[-1, -1] = 5.0
        guard = guarded(logits)
        for workers in (1, 2, 4, 7):
            assert (run(jit, isa, guard, vocab, workers) == argmax(logits)).all()


@pytest.mark.parametrize("isa", TIERS)
def test_nothing_but_nan_gives_an_id_in_range(jit: Jit, isa: str) -> None:
    need(isa)
    logits = guarded(np.full((2, 1000), np.nan, np.float32))
    assert (run(jit, isa, logits, 1000, 3) == 0).all()


@pytest.mark.parametrize("isa", TIERS)
def test_zeros_of_either_sign_are_equal(jit: Jit, isa: str) -> None:
    need(isa)
    logits = guarded(np.array([[-1.0, -0.0, 0.0]], np.float32))
    assert run(jit, isa, logits, 3, 1).tolist() == [1]
