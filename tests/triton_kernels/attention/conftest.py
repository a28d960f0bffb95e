"""Launches of the kernels of codegen/triton/library.py in Triton's interpreter."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from hmc.codegen.triton import library
from hmc.runtime.device_ops.triton.launch import Workspace


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace on the CPU; launches are interpreted. Skips where there is no Triton."""
    interpreted = importlib.import_module("library_interpreted")
    monkeypatch.setattr(library, "kernels", interpreted.kernels)
    monkeypatch.setattr(library, "latent_kernels", interpreted.latent_kernels)
    return Workspace(torch.device("cpu"))


@pytest.fixture
def backwards(work: Workspace, monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From when it is called on, programs run in the opposite order."""
    builder = importlib.import_module("triton.runtime.interpreter").InterpreterBuilder
    original = builder.set_grid_idx

    def opposite(self: Any, *at: int) -> None:
        original(self, *(last - 1 - each for last, each in zip(self.grid_dim, at, strict=True)))

    return lambda: monkeypatch.setattr(builder, "set_grid_idx", opposite)
