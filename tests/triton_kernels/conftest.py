"""Launches in Triton's interpreter."""

from __future__ import annotations

import importlib

import pytest
import torch

from hmc.codegen.triton import build
from hmc.runtime.device_ops.triton.launch import Workspace


@pytest.fixture
def work(monkeypatch: pytest.MonkeyPatch) -> Workspace:
    """A workspace on the CPU; launches are interpreted. Skips where there is no Triton."""
    monkeypatch.setattr(build, "kernels", importlib.import_module("interpreted").kernels)
    return Workspace(torch.device("cpu"))
