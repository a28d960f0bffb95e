"""Fixtures of the kernel tests; of the tier between the best and the smallest, `make test` runs the
expressions, and `make test-all` the rest.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from emulated import new_jit

from hmc.codegen.isa import TIERS
from hmc.codegen.jit import Jit
from hmc.codegen.kernels import EMITTERS

_BETWEEN = list(TIERS)[1:-1]
_ALWAYS = {"test_pointwise.py", "test_checks.py"}


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        here = item.path.parent == Path(__file__).parent and item.path.name not in _ALWAYS
        values = getattr(item, "callspec", None)
        if here and values is not None and values.params.get("isa") in _BETWEEN:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def jit() -> Jit:
    """One engine with every emitter; kernels live as long as it does."""
    return new_jit(EMITTERS)
