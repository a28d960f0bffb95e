"""All of it at once, added from this folder alone: a family whose layers keep a state a sequence
(running.py), do arithmetic of their own in plain torch, and are stored in a format of their own
(e5m2.py); compiled, and run by prefill and decode on the CPU and on GPUs that are played.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import split_plans
import torch
from e5m2 import E5M2_ROWS
from played import executor
from running import CONFIG, Layer, registered
from safetensors.torch import save_file
from test_running import built
from torch import Tensor, nn

import hmc
from hmc.blocks import Block, Linear
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.formats import registered as with_format
from hmc.models import FAMILIES, Family, load
from hmc.models.common import CausalLM
from hmc.plan import Plan
from hmc.runtime.executor import Executor

NAME = "quirky_running"
CLOSE = 0.03
"""Relative error of logits: activations between matmuls are bf16."""


class Quirky(Layer):
    """The layer with a gate on what it adds, and a soft cap: three lines of plain torch."""

    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__(config, index)
        hidden = config.require_int("hidden_size")
        self.gate_proj = Linear(hidden, hidden)

    @property
    def attention_half(self) -> tuple[nn.Module, ...]:
        return (*super().attention_half, self.gate_proj)

    def forward(self, h: Tensor, positions: Tensor) -> Tensor:
        x = self.input_layernorm(h)
        y = self.mixer(x, positions) if self.attends else self.mixer(x)
        y = self.running(y) if self.averages else y
        h = h + torch.sigmoid(self.gate_proj(x)) * torch.tanh(y / 3.0) * 3.0
        return h + self.mlp(self.post_attention_layernorm(h))  # type: ignore[no-any-return]


@pytest.fixture(scope="module", autouse=True)
def known() -> Iterator[None]:
    family = Family(NAME, lambda config: CausalLM(config, lambda i: Quirky(config, i)))
    with registered(), with_format(E5M2_ROWS), pytest.MonkeyPatch.context() as patched:
        patched.setitem(FAMILIES, NAME, family)
        yield


@pytest.fixture(scope="module")
def model(
    tmp_path_factory: pytest.TempPathFactory, known: None
) -> tuple[Path, Callable[[list[int]], np.ndarray]]:
    """A random checkpoint in E5M2, and the float32 logits of a prompt by its torch blocks."""
    folder = tmp_path_factory.mktemp(NAME)
    config = {**CONFIG, "model_type": NAME}
    (folder / "config.json").write_text(json.dumps(config))
    module = load(load_config(folder)).module.to_empty(device="cpu")
    generator, tensors = torch.Generator().manual_seed(3), {}
    plain: list[str] = []
    for path, block in module.named_modules():
        for spec in block.stored(path) if isinstance(block, Block) else ():
            parts = []
            for name in [spec.name.format(e=e) for e in range(spec.experts)] or [spec.name]:
                noise = torch.randn(spec.shape, generator=generator)
                matrix = noise / math.sqrt(spec.shape[-1])
                values = 1 + 0.1 * noise if noise.ndim == 1 else matrix
                values = noise if name.endswith("embed_tokens.weight") else values
                if spec.linear and not name.endswith(("mlp.gate.weight", "lm_head.weight")):
                    scale = values.abs().amax(1, keepdim=True) / 57344
                    tensors[name] = (values / scale).to(torch.float8_e5m2)
                    tensors[f"{name}_scale_inv"] = scale
                    parts.append(tensors[name].float() * scale)
                else:
                    tensors[name] = values.to(torch.bfloat16)
                    plain.append(name.removesuffix(".weight"))
                    parts.append(tensors[name].float())
            with torch.no_grad():
                getattr(block, spec.role).copy_(torch.stack(parts) if spec.experts else parts[0])
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    quant = {"quant_method": "fp8", "fmt": "e5m2", "modules_to_not_convert": plain}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": quant}))

    def expected(ids: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return module(torch.tensor(ids), torch.arange(len(ids))).numpy()  # type: ignore[no-any-return]

    return folder, expected


def _equals(found: Executor, plan: Plan, expected: Callable[[list[int]], np.ndarray]) -> None:
    """Prefill in chunks and decode steps of every phase that the plan has for prompts."""
    ids = np.random.default_rng(5).integers(2, CONFIG["vocab_size"], 90).tolist()
    for phase in [each.name for each in plan.phases if each.name.startswith("prefill")]:
        sequence = found.open()
        *_, last = found.prefill(sequence, np.array(ids[:-2], np.int32), phase=phase)
        rows = [last[-1]]
        for token in ids[-2:]:
            rows.append(found.decode([sequence], np.array([token], np.int32))[0].copy())
        found.release(sequence)
        want = expected(ids)[-3:]
        error = np.linalg.norm(np.stack(rows) - want, axis=1) / np.linalg.norm(want, axis=1)
        assert error.max() < CLOSE, (phase, error)


def test_on_the_cpu(model: tuple[Path, Callable[[list[int]], np.ndarray]]) -> None:
    folder, expected = model
    plan = built(hmc.compile(folder, max_context=320, max_chunk=64, threads=2))
    ops = {step.op for step in plan.phase("decode").steps}
    assert {"running", "pointwise", "attention", "experts"} <= ops
    assert "e5m2_rows" in {weight.format for weight in plan.weights}
    assert {each.format for each in plan.experts} == {"e5m2_rows"}
    with executor(plan, folder) as found:
        _equals(found, plan, expected)


def test_on_devices(
    model: tuple[Path, Callable[[list[int]], np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, expected = model
    machine = split_plans.machine(1)
    assert machine.rates is not None
    rate = machine.rates.gemv[0].model_copy(update={"format": E5M2_ROWS.name})
    rates = machine.rates.model_copy(update={"gemv": (*machine.rates.gemv, rate)})
    rated = machine.model_copy(update={"rates": rates})
    monkeypatch.setattr(split_plans, "machine", lambda *_: rated)
    plan = built(split_plans.split_plan(folder, gpus=1, switches=True))
    assert any(phase.slots for phase in plan.phases)
    with executor(plan, folder) as found:
        _equals(found, plan, expected)
