"""The tiny models, written once a session."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import tiny_models


@pytest.fixture(scope="session")
def tiny(written: Callable[..., Path]) -> Callable[..., Path]:
    """`tiny(family, seed=0)`: a checkpoint of the table of tiny models."""

    def get(family: str, seed: int = 0) -> Path:
        return written(f"tiny-{family}-{seed}", lambda d: tiny_models.write(d, family, seed))

    return get
