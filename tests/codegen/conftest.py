"""Fixtures of the kernel tests."""

from __future__ import annotations

import pytest
from emulated import new_jit

from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS


@pytest.fixture(scope="session")
def jit() -> Jit:
    """One engine with every emitter; kernels live as long as it does."""
    return new_jit(EMITTERS)
