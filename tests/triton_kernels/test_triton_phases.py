"""Whole phases whose GPU steps are hmc's Triton kernels, in Triton's interpreter on CPU memory,
against a CPU plan's engine."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from hmc.codegen.triton import build, library
from hmc.models import FAMILIES
from hmc.runtime.device_ops.gpu import table

LAUNCHED: list[str] = []


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every device is one that kernels are made for."""
    of_matmuls = importlib.import_module("interpreted")
    of_rows = importlib.import_module("library_interpreted")
    monkeypatch.setattr(build, "kernels", of_matmuls.kernels)
    monkeypatch.setattr(library, "kernels", of_rows.kernels)
    monkeypatch.setattr(library, "latent_kernels", of_rows.latent_kernels)
    monkeypatch.setattr(table, "computes", lambda device: True)


CASES = [("deepseek_v3", "fp8"), ("mixtral", "bf16"), ("qwen3_moe", "int4")]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "quant"), CASES)
def test_decode_and_a_streamed_prompt(
    family: str, quant: str, interpreted: None, checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    prompt_and_decode(checkpoint(family, quant), monkeypatch)


@pytest.mark.slow
def test_attention_in_every_way(
    interpreted: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attending = importlib.import_module("attending")
    monkeypatch.setitem(FAMILIES, "attending", attending.FAMILY)
    directory = importlib.import_module("quirky").write(
        tmp_path, "attending", len(attending.kinds())
    )
    prompt_and_decode(directory, monkeypatch)


def prompt_and_decode(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A streamed prompt, and some tokens after it."""
    t = importlib.import_module("test_binding")
    plan = t.compiled.__wrapped__(monkeypatch)(directory, 1)
    with t.bench(directory, plan) as found:
        phases, ids = found.binding.phases, t.ids_of(40)
        expected = t.host_logits(found, ids)
        sequence, rows = found.kv.open(), t.Errors()
        wanted = np.arange(22, 37, dtype=np.int32)
        rows.add(found.run(phases[t.STREAM], [(sequence, ids[:37])], wanted), expected[22:37])
        for at in range(37, 40):
            got = found.run(phases[t.DECODE], [(sequence, ids[at : at + 1])])
            rows.add(got, expected[at : at + 1])
        rows.check()
