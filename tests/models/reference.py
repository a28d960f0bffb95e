"""Runs hmc's own model files in float32 on a checkpoint's dequantised weights."""

from __future__ import annotations

import fnmatch
from pathlib import Path

import torch
from checkpoints import read_dequantised
from torch import Tensor, nn

from hmc.blocks import Block
from hmc.checkpoint.config import load_config
from hmc.graph import WeightSpec
from hmc.models import Model, load


def load_model(directory: Path) -> Model:
    """The model of a checkpoint on the CPU, its weights loaded; every tensor of the checkpoint is
    used, but those that the family leaves aside.
    """
    model = load(load_config(directory))
    module = model.module.to_empty(device="cpu")
    tensors = read_dequantised(directory)
    used = set()
    for path, block in module.named_modules():
        for spec in block.stored(path) if isinstance(block, Block) else ():
            parts = [_part(tensors, spec, expert) for expert in range(max(1, spec.experts))]
            used.update(spec.name.format(e=expert) for expert in range(max(1, spec.experts)))
            assert all(tuple(part.shape) == spec.shape for part in parts), spec
            getattr(block, spec.role).copy_(torch.stack(parts) if spec.experts else parts[0])
    aside = [name for each in model.aside for name in fnmatch.filter(tensors, each.pattern)]
    assert used.isdisjoint(aside)
    assert used | {*aside} == set(tensors)
    return model


def _part(tensors: dict[str, Tensor], spec: WeightSpec, expert: int) -> Tensor:
    """A weight in its tensor, of routed ones that of an expert; dimensions of 1 say nothing."""
    found, view = tensors[spec.name.format(e=expert)], spec.view
    if view is None:
        alike = [n for n in found.shape if n != 1] == [n for n in spec.shape if n != 1]
        return found.reshape(spec.shape) if alike else found
    part = found[expert] if view.stacked(spec.shape) else found
    part = part.T if view.transposed else part
    rows = torch.arange(spec.shape[0])
    return part[view.first + rows // view.run * view.step + rows % view.run]


def run(module: nn.Module, ids: list[int]) -> Tensor:
    """Logits [T, vocab] of a prompt."""
    with torch.inference_mode():
        logits: Tensor = module(torch.tensor(ids), torch.arange(len(ids)))
    return logits
