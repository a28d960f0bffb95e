"""Weights that kernels read as f32 vectors, whatever their dimensions are in a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import Floats

import hmc
from hmc.runtime.host.tables import Tables
from hmc.runtime.weights.store import WeightStore
from hmc.runtime.weights.tensors import array_at


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_weights_of_several_dimensions_are_vectors(
    dtype: torch.dtype, tiny: Callable[..., Path], tmp_path: Path
) -> None:
    """In place where they are stored in F32."""
    source, names = tiny("jamba"), [f"model.layers.0.mamba.{end}" for end in ("A_log", "conv1d")]
    names[1] += ".weight"
    tensors = load_file(source / "model.safetensors")
    tensors |= {name: tensors[name].to(dtype) for name in names}
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    (tmp_path / "config.json").symlink_to(source / "config.json")
    plan = hmc.compile(tmp_path)
    store = WeightStore.open(plan, tmp_path)
    tables = Tables(plan, store)
    for name in names:
        wanted, place = tensors[name].float(), tables.vector(name)
        assert (place == store.address(name)) == (dtype == torch.float32)
        assert np.array_equal(floats(place, wanted.numel()), wanted.flatten())
        turned = wanted.reshape(len(wanted), -1).T
        assert np.array_equal(
            floats(tables.by_column(name, len(wanted)), wanted.numel()), turned.flatten()
        )
    store.close()


def floats(address: int, count: int) -> Floats:
    """What lies at an address."""
    return array_at(address, np.dtype(np.float32), (count,))
