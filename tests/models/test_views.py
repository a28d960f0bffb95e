"""Parameters that are parts of stored tensors: q, k and v in one, experts in a stack with gate and
up in one; the same model, the same tokens as with a tensor each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hmc
from hmc.blocks import Experts, Linear
from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.views import View
from hmc.errors import TensorError
from hmc.models import FAMILIES, Family
from hmc.models.qwen3_moe import build
from hmc.plan import Plan
from hmc.runtime.engine import Engine

IDS = list(range(3, 40))


def fused(config: ModelConfig) -> nn.Module:
    """Qwen3-MoE whose blocks look for their weights in tensors that hold several."""
    module = build(config)
    for block in module.modules():
        if (parts := getattr(block, "q_proj", None)) is not None:
            first, whole = 0, sum(getattr(block, f"{n}_proj").width for n in "qkv")
            for name in "qkv":
                part: Linear = getattr(block, f"{name}_proj")
                part.within = "qkv.weight", View((whole, parts.inputs), first)
                first += part.width
        if isinstance(block, Experts):
            into = block.experts, 2 * block.intermediate, block.width
            block.stacked = {
                "gate": ("gate_up", View(into)),
                "up": ("gate_up", View(into, block.intermediate)),
                "down": ("down", View((block.experts, block.width, block.intermediate))),
            }
    return module


def rewritten(source: Path, target: Path) -> None:
    """The checkpoint with those tensors put together, scales with their codes."""
    tensors = load_file(source / "model.safetensors")
    config = json.loads((source / "config.json").read_text())
    quantised = any(name.endswith("weight_scale_inv") for name in tensors)
    ends = ["weight", "weight_scale_inv"] if quantised else ["weight"]
    made: dict[str, torch.Tensor] = dict(tensors)

    def take(name: str) -> torch.Tensor:
        return made.pop(name)

    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for end in ends:
            tail = end.removeprefix("weight")
            made[f"{at}.self_attn.qkv.{end}"] = torch.cat(
                [take(f"{at}.self_attn.{n}_proj.{end}") for n in "qkv"]
            )
            ours = [n for n in tensors if n.startswith(f"{at}.mlp.experts.")]
            count = sum(n.endswith(f"down_proj.{end}") for n in ours)
            if not count:  # a dense layer
                continue
            experts = [f"{at}.mlp.experts.{e}" for e in range(count)]
            both = [
                torch.cat([take(f"{e}.{n}_proj.{end}") for n in ("gate", "up")]) for e in experts
            ]
            made[f"{at}.mlp.experts.gate_up{tail}"] = torch.stack(both)
            made[f"{at}.mlp.experts.down{tail}"] = torch.stack(
                [take(f"{e}.down_proj.{end}") for e in experts]
            )
    save_file({n: t.contiguous() for n, t in made.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**config, "model_type": "fused"}))


def logits(plan: Plan) -> np.ndarray:
    with Engine(plan, threads=2) as engine:
        return np.asarray(engine.logits(IDS))


@pytest.fixture(autouse=True)
def known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, "fused", Family("fused", fused))


@pytest.mark.slow
@pytest.mark.parametrize("quant", ["bf16", "fp8"])
def test_views_are_the_same_weights(
    checkpoint: Callable[..., Path], tmp_path: Path, quant: str
) -> None:
    sizes: dict[str, Any] = {"head_dim": 128, "moe_intermediate_size": 128}
    source = checkpoint("qwen3_moe", quant, **({} if quant == "bf16" else sizes))
    rewritten(source, tmp_path)
    plan = hmc.compile(tmp_path)
    assert any("qkv.weight[" in weight.name for weight in plan.weights)
    np.testing.assert_array_equal(logits(plan), logits(hmc.compile(source)))


def test_a_stack_of_other_experts_is_refused(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    rewritten(checkpoint("qwen3_moe", "bf16"), tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(each for each in tensors if each.endswith("experts.down"))
    tensors[name] = tensors[name][:-1].contiguous()
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(TensorError, match="experts are stacked"):
        hmc.compile(tmp_path)
