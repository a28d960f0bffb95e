"""What tests share: golden texts, and checkpoints written once a session."""

from __future__ import annotations

import importlib
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    """A background job inherits "ignore" for Ctrl-C, and so would every process of a test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from what tests produce"
    )


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Callable[[str, str], None]:
    """`golden(name, text)` asserts that tests/golden/<name> holds `text`; `--update-golden` writes
    it.
    """
    update = bool(request.config.getoption("--update-golden"))

    def check(name: str, text: str) -> None:
        path = GOLDEN / name
        if update:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        assert path.exists(), f"{path} is missing: run pytest with --update-golden"
        assert text == path.read_text(), f"differs from {path} (--update-golden rewrites it)"

    return check


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`checkpoint(family, quant, **options)`: a directory of `checkpoints.write_checkpoint`, not to
    be changed.
    """
    checkpoints = importlib.import_module("checkpoints")  # only now: it loads transformers
    written: dict[str, Path] = {}

    def get(family: str, quant: str, **options: Any) -> Path:
        key = repr((family, quant, sorted(options.items())))
        if key not in written:
            directory = tmp_path_factory.mktemp(f"{family}-{quant}")
            written[key] = checkpoints.write_checkpoint(directory, family, quant, **options)
        return written[key]

    return get
