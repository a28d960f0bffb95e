"""A model whose quirks are plain torch in its model file, from the file to logits: prefill and
decode on the CPU and on devices played by it, against its own float32 reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import quirky
import torch
from numpy.typing import NDArray
from played import executor
from split_plans import STREAM, split_plan

import hmc
from hmc.codegen.isa import TIERS, cpu_flags
from hmc.errors import VerifyError
from hmc.models import FAMILIES
from hmc.plan import Plan
from hmc.plan.verify import verify_plan
from hmc.runtime.executor import Executor

Floats = NDArray[np.float32]
IDS = np.random.default_rng(5).integers(3, quirky.VOCAB, 40).astype(np.int32)
HERE = [tier.name for tier in TIERS.values() if tier.flags <= cpu_flags()]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, "quirky", quirky.FAMILY)
        yield quirky.write(tmp_path_factory.mktemp("quirky"))


@pytest.fixture(scope="module")
def expected(checkpoint: Path) -> Floats:
    """The reference's logits of every token."""
    with torch.inference_mode():
        model = quirky.reference(checkpoint)
        return model(torch.from_numpy(IDS), torch.arange(len(IDS))).numpy()  # type: ignore[no-any-return]


def assert_close(found: Floats, expected: Floats) -> None:
    """Rounding of activations to bf16; a row may be further away where it tips the choice of an
    expert.
    """
    off = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert np.median(off) < 0.01, off
    assert np.sum(off > 0.05) <= max(1, len(off) // 10), off


def logits_of(found: Executor, prefill: str, decode: str) -> tuple[Floats, Floats]:
    """Of all tokens in one call of a phase, and one by one after the first."""
    sequence = found.open()
    rows = np.arange(len(IDS), dtype=np.int32)[-8:]
    many = found.append(sequence, IDS, rows, prefill).copy()
    found.release(sequence)
    sequence = found.open()
    found.append(sequence, IDS[:8], np.array([7], np.int32), prefill)
    few = [found.decode([sequence], IDS[at : at + 1], decode).copy() for at in range(8, len(IDS))]
    found.release(sequence)
    return many, np.concatenate(few)


@pytest.mark.parametrize(
    "isa", [HERE[0], *(pytest.param(isa, marks=pytest.mark.slow) for isa in HERE[1:])]
)
def test_on_the_cpu(
    isa: str, checkpoint: Path, expected: Floats, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HMC_ISA", isa)
    with hmc.Engine(hmc.compile(checkpoint, max_chunk=16), threads=2) as engine:
        assert_close(engine.logits(IDS.tolist()), expected)
        assert_close(engine.decode_logits(IDS.tolist()), expected)
        assert any(name.startswith("pointwise") for name in engine.executor.kernels_used)


def test_a_broken_pointwise_step_is_refused(checkpoint: Path) -> None:
    plan = hmc.compile(checkpoint)
    (phase, *_), norm = plan.phases, "x0 * rsqrt(mean(square(x0)) + 1e-06) * (1.0 + v0)"
    step = next(each for each in phase.steps if each.attrs.get("expr") == norm)
    (key,) = step.kernels
    changes: list[dict[str, Any]] = [
        {"inputs": {}},
        {"inputs": {"x1": step.inputs["x0"]}},
        {"inputs": {**step.inputs, "x1": step.inputs["x0"]}},
        {"weights": {}},
        {"weights": {"v0": "lm_head.weight"}},
        {"attrs": {**step.attrs, "expr": "x0 * v0"}},
        {"attrs": {**step.attrs, "expr": "x0 * "}},
        {"attrs": {**step.attrs, "columns": "x0=96 v0=48"}},
        {"attrs": {**step.attrs, "groups": 5}},
        {"attrs": {**step.attrs, "out": "f16"}},
    ]
    for change in changes:
        steps = tuple(
            each.model_copy(update=change) if each is step else each for each in phase.steps
        )
        phases = (phase.model_copy(update={"steps": steps}), *plan.phases[1:])
        with pytest.raises(VerifyError):
            verify_plan(plan.model_copy(update={"phases": phases}))
    other = replace(plan.kernels[key], expr=norm.replace("1.0", "2.0"))
    with pytest.raises(VerifyError, match="kernel"):
        verify_plan(plan.model_copy(update={"kernels": {**plan.kernels, key: other}}))


@pytest.mark.few(1)
@pytest.mark.parametrize("gpus", [1, 2])
def test_on_devices(gpus: int, checkpoint: Path, expected: Floats) -> None:
    plan: Plan = split_plan(checkpoint, gpus=gpus, held=0.4)
    on_gpus = {
        step.resource for phase in plan.phases for step in phase.steps if step.op == "pointwise"
    }
    assert on_gpus == {f"gpu{n}" for n in range(gpus)}
    with executor(plan, checkpoint) as found:
        many, few = logits_of(found, STREAM, "decode")
    assert_close(many, expected[-8:])
    assert_close(few, expected[8:])
