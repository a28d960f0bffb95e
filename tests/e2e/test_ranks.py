"""Prompts shared by processes, one a GPU, against the same plan in one process and the CPU plan."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from checkpoints import prompt
from rank_bench import bench, host_logits

Case = tuple[str, str, int, dict[str, int]]

CASES: list[Case] = [("deepseek_v3", "bf16", 4, {})]
MORE: list[Case] = [
    ("qwen3_moe", "fp8", 2, {"num_experts_per_tok": 8, "num_experts": 32}),
    ("mixtral", "bf16", 2, {}),
    ("deepseek_v3", "fp8", 2, {}),
    ("qwen3_moe", "bf16", 4, {"num_experts_per_tok": 4, "num_experts": 8}),
    ("mixtral", "fp8", 4, {"num_experts_per_tok": 4}),
]
if int(os.environ.get("HMC_TEST_SEEDS", "0")) >= 1000:
    CASES += MORE  # every family with every number of ranks: each rank's process takes seconds


@pytest.mark.slow
@pytest.mark.parametrize(("family", "quant", "gpus", "sizes"), CASES)
def test_ranks_give_the_logits_of_one_process(
    family: str, quant: str, gpus: int, sizes: dict[str, int], checkpoint: Callable[..., Path]
) -> None:
    """The same bits as all ranks in one process; within rounding of the CPU plan (relative L2 error
    of a row of logits: 1 % in the median, as tests/runtime/test_binding.py finds it)."""
    with bench(checkpoint(family, quant, layers=2, **sizes), gpus, compared=True) as found:
        errors = []
        # lengths that 2R pieces do not divide, the shortest, then one prompt in two calls
        for length, first in ((61, 61), (2 * gpus, 2 * gpus), (83, 40)):
            ids = np.array(prompt(length, length), np.int32)
            results = []
            for run in (found.by_processes, found.in_process):
                sequence = found.kv.open()
                parts = [ids[:first], ids[first:]] if first < length else [ids]
                results.append([run(sequence, part, len(part) // (2 * gpus)) for part in parts])
                found.kv.release(sequence)
            expected = host_logits(found, ids)
            at = 0
            for mine, here in zip(*results, strict=True):
                at = first if not at else length
                np.testing.assert_array_equal(mine, here)
                rows = expected[at - len(mine) : at]
                errors += list(np.linalg.norm(mine - rows, axis=1) / np.linalg.norm(rows, axis=1))
        assert np.median(errors) < 0.01, errors
        assert np.mean(np.array(errors) > 0.03) <= 0.25, errors
