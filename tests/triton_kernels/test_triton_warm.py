"""Kernels made ready when a plan is opened: calls of its phases find every one that they launch."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("triton")

import triton_gpu
from counted import MetaBound
from hybrid_plans import ONE, plan_for

from hmc.codegen.triton.compiling import make_ready
from hmc.errors import KernelError
from hmc.plan import Plan
from hmc.plan.memory import kind_of
from hmc.plan.phases import STREAM
from hmc.runtime.binding.warm import numbers_between, warm
from hmc.runtime.device_ops.gpu import attends, dense, routed, table
from hmc.runtime.device_ops.gpu.table import TRITON_OPS
from hmc.runtime.device_ops.triton import rows

CASES = [
    ("deepseek_v3", "fp8", 1),
    pytest.param("qwen3_moe", "int4", 1, marks=pytest.mark.slow),
    pytest.param("mixtral", "bf16", 2, marks=pytest.mark.slow),
    pytest.param("deepseek_v3", "fp8", 2, marks=pytest.mark.slow),
]


class InPlace:
    """A backend whose streams do what they are given at once."""

    def __init__(self, devices: list[Any]) -> None:
        self.devices = devices

    def stream(self, resource: str, *, aside: bool) -> Any:
        return SimpleNamespace(launch=lambda work, label: work())

    def synchronize(self) -> None:
        """Nothing is under way."""


@pytest.mark.parametrize(("family", "quant", "gpus"), CASES)
def test_calls_find_all_kernels(
    family: str,
    quant: str,
    gpus: int,
    checkpoint: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    t = importlib.import_module("test_binding")
    directory = checkpoint(family, quant)
    plan = t.compiled.__wrapped__(monkeypatch)(directory, gpus)
    monkeypatch.setattr(table, "computes", lambda device: True)
    monkeypatch.setattr("hmc.runtime.binding.warm.computes", lambda device: True)
    for module in (dense, routed, attends):
        monkeypatch.setattr(module, "in_eights", lambda w, device: w.layout.kind == "e4m3")
    with triton_gpu.gpu(90, compiles=False) as gpu, t.bench(directory, plan) as found:
        phases, backend = found.binding.phases, InPlace(found.devices)
        warm(phases.values(), backend)
        before = {name: len(keys) for name, keys in gpu.compiled.items()}
        assert {"linear", "experts_act", "experts_down", "route", "add_norm"} <= before.keys()
        assert max(before.values()) > 1
        for bound in phases.values():
            for tokens in numbers(bound):
                for call in calls(found.kv, bound, tokens):
                    for step, work in zip(bound.phase.steps, bound.works, strict=True):
                        if step.op in TRITON_OPS and step.resource != "cpu":
                            work(call)
        assert {name: len(keys) for name, keys in gpu.compiled.items()} == before


def numbers(bound: Any) -> list[int]:
    """Tokens of calls: every number of few, some of many."""
    least = max(bound.phase.lanes, 2 * bound.phase.ranks if bound.phase.ranks > 1 else 1)
    return sorted({*range(least, min(bound.max_tokens, 20)), *range(20, bound.max_tokens, 37)})


def calls(kv: Any, bound: Any, tokens: int) -> Any:
    """At the beginning of sequences and far behind it, with logits of one token and of all."""
    ids, wanted = np.zeros(tokens, np.int32), np.arange(tokens, dtype=np.int32)
    decodes = kind_of(bound.phase) == "decode"
    for past in (0, bound.plan.limits.max_context - tokens):
        if decodes:
            yield bound.call(ids, np.full(tokens, past, np.int32), wanted, wanted)
        else:
            for rows in (wanted[-1:], wanted[-min(bound.max_wanted, -(-tokens // 4)) :]):
                yield bound.call(ids, wanted + past, ids, rows)


@pytest.mark.slow
def test_true_shapes_find_all_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, rng = plan_for("deepseek-v3", ONE, 5, vram=26), np.random.default_rng(1)
    for module in (dense, routed, attends):
        monkeypatch.setattr(module, "in_eights", lambda w, device: w.layout.kind == "e4m3")
    with triton_gpu.gpu(120, 170, compiles=False) as gpu:
        most = plan.phase(STREAM).max_tokens
        for tokens in numbers_between(1, most):
            of_true_shapes(plan, tokens, 0)
        before = {name: len(keys) for name, keys in gpu.compiled.items()}
        for tokens in (most * 2.0 ** -rng.uniform(0, 12, 30)).astype(int):
            of_true_shapes(plan, int(tokens), 3000)
        assert {name: len(keys) for name, keys in gpu.compiled.items()} == before
    assert sum(before.values()) < 40


def of_true_shapes(plan: Plan, tokens: int, past: int) -> None:
    """What a layer launches."""
    bound = MetaBound(plan, plan.phase(STREAM), tokens, past)
    call = bound.call()
    for step in bound.phase.steps:
        if step.layer == 4 and step.resource == "gpu0" and step.op in TRITON_OPS:
            TRITON_OPS[step.op](bound, step)(call)


def half(*shape: int) -> torch.Tensor:
    return torch.zeros(*shape, dtype=torch.bfloat16, device="meta")


def norms() -> None:
    x = torch.zeros(3, 64, device="meta")
    rows.norm(x, half(64), half(3, 64), groups=1, eps=1e-6)
    rows.add_norm(x, x, None, x)


def test_kernels_are_compiled_and_loaded_once_and_then_launched() -> None:
    told: list[tuple[str, int, int]] = []
    with triton_gpu.gpu(80) as gpu:
        make_ready(norms, lambda *each: told.append(each))
        assert {name: len(made) for name, made in gpu.compiled.items()} == {
            "norm": 1,
            "add_norm": 1,
        }
        assert len(gpu.loaded) == 2 and not gpu.launches
        assert told == [("compiling kernels", 1, 2), ("compiling kernels", 2, 2)]
        norms()
        assert len(gpu.loaded) == gpu.launches == 2
        assert all(len(made) == 1 for made in gpu.compiled.values())


def test_what_triton_says_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> Any:
        raise RuntimeError("no such instruction\nand more")

    monkeypatch.setattr("triton.compiler.compiler.compile", broken)
    monkeypatch.setattr("triton.compiler.compile", broken)
    with (
        triton_gpu.gpu(80),
        pytest.raises(
            KernelError, match=r"cannot be made: RuntimeError: no such instruction and more$"
        ),
    ):
        make_ready(norms)
