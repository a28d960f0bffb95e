"""Logits against transformers: our error must be no larger than that of transformers in BF16.

The reference is transformers in FP32 on the dequantised weights. Errors are relative L2 norms per
token; a near-tie of the router flips an expert in both implementations, so medians and counts of
large errors are compared, never means.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES
from logit_errors import Floats, errors, oracle, prompt

import hmc
from hmc.codegen.isa import TIERS, cpu_flags

LENGTHS = (1, 7, 64, 300)


def assert_no_worse(cases: list[tuple[Floats, Floats, Floats]]) -> None:
    """For (ours, FP32, BF16) logits of several prompts: each median at most 1.05x that of
    transformers in BF16, and over all prompts no more tokens above 5 %.
    """
    large = [0, 0]
    for found, reference, bf16 in cases:
        assert np.isfinite(found).all()
        ours, theirs = errors(found, reference), errors(bf16, reference)
        assert np.median(ours) <= 1.05 * np.median(theirs), (np.median(ours), np.median(theirs))
        large[0] += int((ours > 0.05).sum())
        large[1] += int((theirs > 0.05).sum())
    assert large[0] <= large[1]


BEST, *OTHERS = [tier.name for tier in TIERS.values() if tier.flags <= cpu_flags()]
"""The kernel tiers this machine can run."""

ALWAYS = [("qwen3_moe", "bf16"), ("mixtral", "int4"), ("deepseek_v3", "fp8")]
CASES = [
    pytest.param(family, quant, BEST, marks=() if (family, quant) in ALWAYS else pytest.mark.slow)
    for family in ("qwen3_moe", "mixtral", "deepseek_v3")
    for quant in ("bf16", "fp8", "int4")
] + [
    pytest.param(family, quant, isa, marks=pytest.mark.slow)
    for isa in OTHERS
    for family, quant in ALWAYS
]


@pytest.mark.parametrize(("family", "quant", "isa"), CASES)
def test_logits_are_as_close_as_transformers_in_bf16(
    family: str,
    quant: str,
    isa: str,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HMC_ISA", isa)
    directory = checkpoint(family, quant)
    with hmc.Engine(hmc.compile(directory, max_chunk=128)) as engine:
        assert {isa} == {kernel.isa for kernel in engine.plan.kernels.values()}
        cases = [(tokens, *oracle(directory, tokens)) for tokens in LENGTHS]
        assert_no_worse([(engine.logits(prompt(n)), *known) for n, *known in cases])
        assert_no_worse([(engine.decode_logits(prompt(n)), *known) for n, *known in cases])
        ran = " ".join(engine.executor.kernels_used)
        assert isa in ran
        assert quant in ran


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["fp16", "f32"])
def test_other_stored_formats(quant: str, checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("qwen3_moe", quant)
    with hmc.Engine(hmc.compile(directory)) as engine:
        known = oracle(directory, 64)
        assert_no_worse([(engine.logits(prompt(64)), *known)])
        assert_no_worse([(engine.decode_logits(prompt(64)), *known)])


def test_bf16_scales(checkpoint: Callable[..., Path]) -> None:
    directory = checkpoint("deepseek_v3", "fp8", scale_dtype=torch.bfloat16)
    with hmc.Engine(hmc.compile(directory)) as engine:
        assert_no_worse([(engine.logits(prompt(64)), *oracle(directory, 64))])


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_threads_or_chunks(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    directory = checkpoint(family, "fp8")
    answers = set()
    rows = []
    for threads in (1, 2, 4):
        with hmc.Engine(hmc.compile(directory), threads=threads) as engine:
            answers.add(tuple(engine.generate(prompt(40), max_new_tokens=24).token_ids))
            rows.append(engine.decode_logits(prompt(20)))
    assert len(answers) == 1
    assert all(np.array_equal(rows[0], other) for other in rows[1:])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_batch_gives_the_tokens_of_each_alone(
    family: str, checkpoint: Callable[..., Path]
) -> None:
    """Decode rows are bit-identical whoever shares the call."""
    directory = checkpoint(family, "fp8")
    prompts = [prompt(length) for length in (3, 9, 17, 5)]
    with hmc.Engine(hmc.compile(directory)) as engine:
        alone = [engine.decode_logits(ids) for ids in prompts]
        together = _decode_together(engine, prompts)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def test_more_sequences_than_a_step_takes(checkpoint: Callable[..., Path]) -> None:
    prompts = [prompt(length) for length in range(2, 22)]
    plan = hmc.compile(checkpoint("qwen3_moe", "fp8"), concurrency=len(prompts), max_context=64)
    assert plan.phase("decode").max_tokens < len(prompts) <= plan.limits.max_batch
    with hmc.Engine(plan) as engine:
        alone = [engine.decode_logits(ids) for ids in prompts]
        together = _decode_together(engine, prompts)
    for one, other in zip(alone, together, strict=True):
        assert np.array_equal(one, other)


def _decode_together(engine: hmc.Engine, prompts: list[list[int]]) -> list[Floats]:
    """Logits of every prompt, token by token, all prompts that are not yet done in one call."""
    sequences = [engine.executor.open() for _ in prompts]
    rows: list[list[Floats]] = [[] for _ in prompts]
    for position in range(max(map(len, prompts))):
        live = [n for n, ids in enumerate(prompts) if position < len(ids)]
        tokens = np.array([prompts[n][position] for n in live], np.int32)
        logits = engine.executor.decode([sequences[n] for n in live], tokens)
        for n, row in zip(live, logits, strict=True):
            rows[n].append(row.copy())
    for sequence in sequences:
        engine.executor.release(sequence)
    return [np.stack(found) for found in rows]
