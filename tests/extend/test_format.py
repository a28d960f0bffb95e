"""A format that only tests have, from a checkpoint to logits: prefill and decode, on the CPU and on
GPUs that the host device stands for, beside the same model stored as F32.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import split_plans
import torch
from checkpoints import _LINEAR, prompt
from e5m2 import E5M2_ROWS
from safetensors.torch import load_file, save_file

import hmc
from hmc.formats import registered
from hmc.plan import Plan
from hmc.runtime.engine import Engine

IDS = prompt(40, 3)


@pytest.fixture(autouse=True)
def known() -> Iterator[None]:
    with registered(E5M2_ROWS):
        yield


@pytest.fixture
def twins(checkpoint: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A checkpoint in E5M2 with a scale a row, and one of the same values in F32."""
    source = checkpoint("deepseek_v3", "bf16", layers=2)
    settings = json.loads((source / "config.json").read_text())
    own: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, weight in load_file(source / "model.safetensors").items():
        wide = weight.float()
        if not _LINEAR.search(name):
            own[name], plain[name] = weight, wide
            continue
        scale = wide.abs().amax(1, keepdim=True) / 57344
        codes = (wide / scale).to(torch.float8_e5m2)
        own[name], own[f"{name}_scale_inv"] = codes, scale
        plain[name] = codes.float() * scale
    kept = [name.removesuffix(".weight") for name in own if not _LINEAR.search(name)]
    config = {"quant_method": "fp8", "fmt": "e5m2", "modules_to_not_convert": kept}
    return (
        _written(tmp_path / "own", own, settings | {"quantization_config": config}),
        _written(tmp_path / "plain", plain, settings | {"dtype": "float32"}),
    )


def _written(path: Path, tensors: dict[str, torch.Tensor], settings: dict[str, Any]) -> Path:
    path.mkdir()
    save_file(tensors, path / "model.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(settings))
    return path


def logits_of(plan: Plan, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Logits of every token by prefill, and of the last ones by decode."""
    with Engine(plan, threads=2, **options) as engine:
        whole = engine.logits(IDS)
        sequence = engine.executor.open()
        for _ in engine.executor.prefill(sequence, np.array(IDS[:-3], np.int32)):
            pass
        steps = [
            engine.executor.decode([sequence], np.array([token], np.int32)).copy()
            for token in IDS[-3:]
        ]
    return np.asarray(whole), np.concatenate(steps)


def close(found: np.ndarray, expected: np.ndarray) -> None:
    """Nearly all tokens; rounding may take one to another expert."""
    error = np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)
    assert np.quantile(error, 0.8) < 1e-2


@pytest.mark.slow
def test_logits(twins: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    own, plain = twins
    plan = hmc.compile(own)
    assert {weight.format for weight in plan.weights} == {"e5m2_rows", "bf16", "f32"}
    assert {each.format for each in plan.experts} == {"e5m2_rows"}
    expected = logits_of(hmc.compile(plain))
    for mine, theirs in zip(logits_of(plan), expected, strict=True):
        close(mine, theirs)
    found = split_plans.machine(1)
    assert found.rates is not None
    rate = found.rates.gemv[0].model_copy(update={"format": E5M2_ROWS.name})
    rates = found.rates.model_copy(update={"gemv": (*found.rates.gemv, rate)})
    measured = found.model_copy(update={"rates": rates})
    monkeypatch.setattr(split_plans, "machine", lambda *_: measured)
    split = split_plans.split_plan(own, gpus=1)
    for mine, theirs in zip(logits_of(split, devices="host"), expected, strict=True):
        close(mine, theirs)


@pytest.mark.slow
def test_dummies(twins: tuple[Path, Path]) -> None:
    own, _ = twins
    plan = hmc.compile(own, dummy_weights=True)
    with Engine(plan, threads=2, dummy_weights=True) as engine:
        assert np.isfinite(engine.logits(IDS[:5])).all()
