"""Shares in pieces: a model gives the same logits, bit for bit, however its work is cut."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import hmc
from hmc.codegen.pool import walker
from hmc.runtime.host import lowering

IDS = np.array([5, 3, 100, 41, 7, 7, 250, 9], np.int32)


def _logits(plan: hmc.Plan, threads: int) -> tuple[np.ndarray, int]:
    """Logits of a few decode steps of three sequences, and how many records are in pieces."""
    with hmc.Engine(plan, threads=threads) as engine:
        run, found = engine.executor, []
        program = run.phases["decode"].program
        cut = int(np.count_nonzero(program.records[:, 2] & ~walker.BARRIER))
        sequences = [run.open() for _ in range(3)]
        for step in range(4):
            found.append(run.decode(sequences, IDS[step : step + 3]).copy())
        for sequence in sequences:
            run.release(sequence)
    return np.array(found), cut


@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_pieces_change_no_bit(
    family: str, checkpoint: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = hmc.compile(checkpoint(family, "fp8"), max_context=64)
    whole, cut = _logits(plan, 1)
    assert cut == 0
    monkeypatch.setattr(lowering, "_PIECE_BYTES", 64)
    monkeypatch.setattr(lowering, "_LEAST_PIECES", 1)
    assert _logits(plan, 1)[1] == 0  # nobody to share with
    for threads, drawn in [(2, 0.25), (2, 1.0), (3, 0.5)]:
        monkeypatch.setattr(lowering, "_DRAWN", drawn)
        logits, cut = _logits(plan, threads)
        assert cut > 0
        np.testing.assert_array_equal(logits, whole)


@pytest.mark.parametrize(
    ("size", "rows", "workers", "expected"),
    [
        (1 << 30, 1 << 20, 1, (0, 0)),  # alone
        (3 << 17, 1 << 20, 1, (0, 0)),
        (1 << 20, 1 << 20, 2, (4, 3)),  # 128 KiB each
        (7 << 17, 1 << 20, 2, (0, 0)),  # three would be too few
        (1 << 30, 1 << 20, 2, (32, 24)),  # never more
        (1 << 30, 16 * 10, 2, (5, 4)),  # no piece without rows
        (1 << 30, 1 << 20, 100, (32, 24)),
    ],
)
def test_how_many(size: int, rows: int, workers: int, expected: tuple[int, int]) -> None:
    assert lowering._pieces(size, rows, workers) == expected
