"""How far logits are off, and the bound that tests hold them to: transformers in BF16."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import torch
from checkpoints import VOCAB, oracle_logits
from numpy.typing import NDArray

Floats = NDArray[np.float32]


def prompt(tokens: int) -> list[int]:
    """Fixed token ids, no special ones."""
    return [int(x) for x in np.random.default_rng(tokens).integers(3, VOCAB, tokens)]


@cache
def oracle(directory: Path, tokens: int) -> tuple[Floats, Floats]:
    """(FP32 logits, BF16 logits) of transformers for `prompt`."""
    ids = prompt(tokens)
    return (
        oracle_logits(directory, ids, torch.float32),
        oracle_logits(directory, ids, torch.bfloat16),
    )


def errors(found: Floats, reference: Floats) -> Floats:
    """Relative L2 error of every token's logits."""
    assert found.shape == reference.shape and np.isfinite(found).all()
    difference = np.linalg.norm(found.astype(np.float64) - reference, axis=1)
    return (difference / np.linalg.norm(reference.astype(np.float64), axis=1)).astype(np.float32)


def assert_as_close_as_bf16(
    ours: Callable[[list[int]], Floats], twin: Path, lengths: tuple[int, ...], flips: float = 0.08
) -> None:
    """`ours` is a function of a prompt, `twin` a directory of the same weights in F32: the median
    error of all tokens is at most 1.05x that of transformers in BF16. `flips` is the share of
    tokens that may err by over 5 % beyond those of transformers: a near tie of a router goes
    another way in each arithmetic, and tokens after it hear of it.
    """
    found, bound = [], []
    for length in lengths:
        exact, bf16 = oracle(twin, length)
        found.append(errors(ours(prompt(length)), exact))
        bound.append(errors(bf16, exact))
    ours_, theirs = np.concatenate(found), np.concatenate(bound)
    assert np.median(ours_) <= 1.05 * np.median(theirs), (np.median(ours_), np.median(theirs))
    assert (ours_ > 0.05).mean() <= (theirs > 0.05).mean() + flips
