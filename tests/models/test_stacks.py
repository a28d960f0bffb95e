"""Experts in stacks, gate and up interleaved, axes exchanged, with biases: the same weights, bit
for bit, as with a tensor an expert, wherever weights live.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import tiny_plan
from safetensors.torch import load_file, save_file
from test_views import logits
from torch import nn

import hmc
from hmc.blocks import Experts
from hmc.blocks.base import parameter
from hmc.checkpoint.config import ModelConfig
from hmc.errors import TensorError, VerifyError
from hmc.models import FAMILIES, Family
from hmc.models.qwen3_moe import build
from hmc.models.stacks import stacked
from hmc.plan import Plan
from hmc.plan.verify import verify_plan
from hmc.runtime.weights import fill, store
from hmc.runtime.weights.store import Shared, WeightStore
from hmc.runtime.weights.tensors import array_at

LAYOUTS = [
    {"interleaved": True},
    {"transposed": True},
    {"interleaved": True, "transposed": True},
]
QUANTS = {"bf16": LAYOUTS, "fp8": LAYOUTS[1:2]}
CASES = [
    pytest.param(quant, layout, marks=() if len(layout) > 1 else pytest.mark.slow)
    for quant, layouts in QUANTS.items()
    for layout in layouts
]


def model(config: ModelConfig, layout: dict[str, bool] | None) -> nn.Module:
    """Qwen3-MoE whose experts have biases; in stacks where there is a layout."""
    module = build(config)
    for block in module.modules():
        if isinstance(block, Experts):
            sizes = block.experts, block.width, block.intermediate
            block.stacked = {} if layout is None else stacked(*sizes, bias=True, **layout)
            block.gate_bias = parameter(block.experts, block.intermediate)
            block.up_bias = parameter(block.experts, block.intermediate)
            block.down_bias = parameter(block.experts, block.width)
    return module


def written(source: Path, target: Path, layout: dict[str, bool] | None) -> Path:
    """The checkpoint with biases of experts, and these in stacks where there is a layout."""
    tensors = dict(load_file(source / "model.safetensors"))
    config = json.loads((source / "config.json").read_text())
    generator = torch.Generator().manual_seed(1)
    count = config.get("num_experts", config.get("num_local_experts"))
    hidden, inner = config["hidden_size"], config["moe_intermediate_size"]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}.mlp.experts"
        if not any(name.startswith(f"{at}.") for name in tensors):
            continue
        for name, size in (("gate", inner), ("up", inner), ("down", hidden)):
            for e in range(count):
                bias = torch.randn(size, generator=generator).bfloat16()
                tensors[f"{at}.{e}.{name}_proj.bias"] = bias
        if layout is not None:
            _stack(tensors, at, count, **layout)
    target.mkdir()
    save_file({n: t.contiguous() for n, t in tensors.items()}, target / "model.safetensors")
    (target / "config.json").write_text(json.dumps({**config, "model_type": f"s{target.name}"}))
    return target


def _stack(
    tensors: dict[str, torch.Tensor], at: str, count: int, interleaved: bool = False,
    transposed: bool = False,
) -> None:  # fmt: skip
    ends = {name.split("_proj.")[1] for name in tensors if name.startswith(f"{at}.0.up")}
    for end in ends:
        each = {
            name: torch.stack([tensors.pop(f"{at}.{e}.{name}_proj.{end}") for e in range(count)])
            for name in ("gate", "up", "down")
        }
        both = torch.stack((each["gate"], each["up"]), 2 if interleaved else 1).flatten(1, 2)
        tail = "_bias" if end == "bias" else end.removeprefix("weight")
        for name, stack in (("gate_up", both), ("down", each["down"])):
            turned = stack.transpose(1, 2) if transposed and end != "bias" else stack
            tensors[f"{at}.{name}_proj{tail}"] = turned


@pytest.fixture
def plans(
    checkpoint: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[[str, dict[str, bool]], tuple[Plan, Plan]]:
    def of(quant: str, layout: dict[str, bool]) -> tuple[Plan, Plan]:
        sizes: dict[str, Any] = {"layers": 2, "mlp_only_layers": []}
        sizes |= {"hidden_size": 256, "moe_intermediate_size": 128} if quant == "fp8" else {}
        source, made = checkpoint("qwen3_moe", quant, **sizes), []
        for name, how in (("apart", None), ("stacks", layout)):
            family = Family(f"s{name}", partial(model, layout=how))
            monkeypatch.setitem(FAMILIES, f"s{name}", family)
            made.append(hmc.compile(written(source, tmp_path / name, how)))
        return made[0], made[1]

    return of


@pytest.mark.parametrize(("quant", "layout"), CASES, ids=str)
def test_stacks_are_the_same_weights(
    quant: str,
    layout: dict[str, bool],
    plans: Callable[[str, dict[str, bool]], tuple[Plan, Plan]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    apart, stacks = plans(quant, layout)
    assert any(plane.pick is not None for each in stacks.experts for plane in each.planes)
    monkeypatch.setattr(fill, "_PICKED", 3000)  # some rows at a time
    np.testing.assert_array_equal(logits(stacks), logits(apart))
    monkeypatch.setattr(store, "_LITTLE", 0)
    directory = Path(stacks.checkpoint.path)
    with_file = WeightStore.open(stacks, directory)
    try:
        assert with_file.beside is not None
        assert with_file.arena is None
        _, attached = Shared.of(stacks, with_file, directory).open()
        try:
            for layer in {each.layer for each in stacks.experts}:
                mine, theirs = (
                    [one.expert_vectors(layer, "up_bias"), *_codes(one, layer)]
                    for one in (with_file, attached)
                )
                for one, other in zip(mine, theirs, strict=True):
                    np.testing.assert_array_equal(one, other)
        finally:
            attached.close()
    finally:
        with_file.close()


def _codes(one: WeightStore, layer: int) -> list[np.ndarray]:
    found = []
    for group, addresses in one.codes():
        if group.key[:2] == ("expert", layer):
            raw = np.dtype(np.uint8)
            found += [array_at(int(a), raw, (group.form.bytes,)).copy() for a in addresses]
    return found


def test_mxfp4_as_gpt_oss_has_it(
    plans: Callable[[str, dict[str, bool]], tuple[Plan, Plan]], tmp_path: Path
) -> None:
    """Blocks of 16 bytes of a group apart from its exponents, rows of gate and up by turns."""
    plans("bf16", {"interleaved": True})
    path = tmp_path / "stacks"
    tensors, rng = dict(load_file(path / "model.safetensors")), np.random.default_rng(2)
    wanted: dict[str, list[np.ndarray]] = {"codes": [], "scale": []}
    for name in [each for each in tensors if each.endswith("up_proj") and "experts" in each]:
        for stack in (name, name.replace("gate_up", "down")):
            count, rows, columns = tensors.pop(stack).shape
            blocks = rng.integers(0, 256, (count, rows, columns // 32, 16), np.uint8)
            scales = rng.integers(120, 128, (count, rows, columns // 32), np.uint8)
            tensors[f"{stack}_blocks"] = torch.from_numpy(blocks)
            tensors[f"{stack}_scales"] = torch.from_numpy(scales)
            if stack == name:
                wanted["codes"].append(blocks[:, 1::2].reshape(count, rows // 2, -1))
                wanted["scale"].append(scales[:, 1::2])
    save_file(tensors, path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]}
    (path / "config.json").write_text(json.dumps(config))
    plan = hmc.compile(path)
    assert {each.format for each in plan.experts if "bias" not in each.role} == {"mxfp4"}
    with closing(WeightStore.open(plan, path)) as weights:
        layers = sorted({each.layer for each in plan.experts})
        for at, layer in enumerate(layers):
            for plane, places in zip(wanted, weights.expert_planes(layer, "up"), strict=True):
                exact = wanted[plane][at]
                for place, one in zip(places, exact, strict=True):
                    found = array_at(int(place), np.dtype(np.uint8), one.shape)
                    np.testing.assert_array_equal(found, one)


def test_broken_picks_are_refused(
    plans: Callable[[str, dict[str, bool]], tuple[Plan, Plan]],
) -> None:
    _, plan = plans("bf16", {"interleaved": True})
    verify_plan(plan)
    first, *others = plan.experts
    plane = first.planes[0]
    assert plane.pick is not None
    for change in (
        {"first": 1},
        {"step": 1},
        {"step": 3},
        {"rows": 7},
        {"transposed": True},
        {"run": 2},
        {"run": 3},
    ):
        pick = plane.pick.model_copy(update=change)
        broken = plane.model_copy(update={"pick": pick})
        experts = first.model_copy(update={"planes": (broken,)}), *others
        with pytest.raises(VerifyError):
            verify_plan(plan.model_copy(update={"experts": experts}))


def test_what_cannot_be_turned_is_refused(
    plans: Callable[[str, dict[str, bool]], tuple[Plan, Plan]],
) -> None:
    with pytest.raises(TensorError, match="rows of several weights"):
        plans("fp8", {"interleaved": True})


@pytest.mark.slow
def test_experts_that_a_family_stacks_may_lie_one_by_one(
    tiny: Callable[[str], Path], tmp_path: Path
) -> None:
    """As quantised files of such families have them."""
    source = tiny("llama4")
    tensors = dict(load_file(source / "model.safetensors"))
    at = "language_model.model.layers.1.feed_forward.experts"
    into, back = (tensors.pop(f"{at}.{name}_proj").mT for name in ("gate_up", "down"))
    for e, (gate, up) in enumerate(each.chunk(2) for each in into):
        for name, part in (("gate", gate), ("up", up), ("down", back[e])):
            tensors[f"{at}.{e}.{name}_proj.weight"] = part.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").write_text((source / "config.json").read_text())
    found, expected = (logits(tiny_plan(each)) for each in (tmp_path, source))
    assert np.array_equal(found, expected)
