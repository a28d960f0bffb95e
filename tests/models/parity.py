"""How near hmc comes to transformers on a tiny model: relative L2 errors of every token's logits
against transformers in FP32.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from tiny_models import Floats, oracle, prompt

import hmc


class Parity(NamedTuple):
    """Errors of hmc's prefill and decode, and of transformers in BF16."""

    prefill: Floats
    decode: Floats
    bf16: Floats


def parity(directories: Iterable[Path]) -> Parity:
    """Of all prompts of several models together."""
    found = [_of(directory) for directory in directories]
    return Parity(*(np.concatenate(each) for each in zip(*found, strict=True)))


def tiny_plan(directory: Path) -> hmc.Plan:
    """A plan for this machine."""
    return hmc.compile(directory, max_chunk=32, max_context=64, threads=2)


def errors(found: Floats, exact: Floats) -> Floats:
    """Relative L2 error of every token's logits."""
    assert found.shape == exact.shape and np.isfinite(found).all()
    return np.linalg.norm(found - exact, axis=1) / np.linalg.norm(exact, axis=1)


def _of(directory: Path) -> Parity:
    exact = oracle(directory, torch.float32)
    with hmc.Engine(tiny_plan(directory), threads=2) as engine:
        prefill = errors(engine.logits(prompt()), exact)
        decode = errors(engine.decode_logits(prompt()), exact)
    return Parity(prefill, decode, errors(oracle(directory, torch.bfloat16), exact))
