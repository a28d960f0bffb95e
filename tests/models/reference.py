"""Runs hmc's own model files in float32 on a checkpoint's dequantised weights."""

from __future__ import annotations

from pathlib import Path

import torch
from checkpoints import read_dequantised
from torch import Tensor, nn

from hmc.blocks import Block
from hmc.checkpoint.config import load_config
from hmc.models import Model, load


def load_model(directory: Path) -> Model:
    """The model of a checkpoint on the CPU, its weights loaded; every tensor of the checkpoint is
    used.
    """
    model = load(load_config(directory))
    module = model.module.to_empty(device="cpu")
    tensors = read_dequantised(directory)
    used = set()
    for path, block in module.named_modules():
        if not isinstance(block, Block):
            continue
        for spec in block.weights(path):
            names = [spec.name.format(e=e) for e in range(spec.experts)] or [spec.name]
            parts = [tensors[name] for name in names]
            used.update(names)
            assert all(tuple(part.shape) == spec.shape for part in parts), spec
            getattr(block, spec.role).copy_(torch.stack(parts) if spec.experts else parts[0])
    assert used == set(tensors)
    return model


def run(module: nn.Module, ids: list[int]) -> Tensor:
    """Logits [T, vocab] of a prompt."""
    with torch.inference_mode():
        logits: Tensor = module(torch.tensor(ids), torch.arange(len(ids)))
    return logits
