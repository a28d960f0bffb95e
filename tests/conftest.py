"""What tests share: golden texts, and checkpoints written once a session."""

from __future__ import annotations

import gc
import importlib
import os
import signal
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest

# The suite runs a process a core already. Set before anything loads torch or numpy.
for _library in ("OMP", "OPENBLAS", "MKL"):
    os.environ.setdefault(f"{_library}_NUM_THREADS", "1")

GOLDEN = Path(__file__).parent / "golden"


def pytest_configure() -> None:
    """A background job inherits "ignore" for Ctrl-C, and so would every process of a test."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--update-golden", action="store_true", help="rewrite tests/golden from what tests produce"
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of a test marked `few(n)` any n of its cases are quick; the draw depends on names alone, so
    a case stays what it is when others come.
    """
    tests: dict[str, list[pytest.Item]] = {}
    for item in items:
        if item.get_closest_marker("few") and not item.get_closest_marker("slow"):
            tests.setdefault(item.nodeid.partition("[")[0], []).append(item)
    for cases in tests.values():
        mark = cases[0].get_closest_marker("few")
        assert mark is not None
        drawn = sorted(cases, key=lambda case: sha256(case.nodeid.encode()).digest())
        for case in drawn[mark.args[0] :]:
            case.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that looks at it takes a quarter of a second."""
    gc.freeze()
    gc.set_threshold(20_000, 10, 20)


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
def written(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`written(name, write)`: the directory `name`, filled by `write(directory)` once a session and
    not to be changed; the session's processes share it.
    """
    base = tmp_path_factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base

    def get(name: str, write: Callable[[Path], object]) -> Path:
        directory = shared / name
        if not directory.exists():
            beside = tmp_path_factory.mktemp(name)
            write(beside)
            try:
                beside.rename(directory)
            except OSError:
                if not directory.exists():  # by another process, which was faster
                    raise
        return directory

    return get


@pytest.fixture(scope="session")
def checkpoint(written: Callable[..., Path]) -> Callable[..., Path]:
    """`checkpoint(family, quant, **options)`: a directory of `checkpoints.write_checkpoint`."""

    def get(family: str, quant: str, **options: Any) -> Path:
        key = sha256(repr(sorted(options.items())).encode()).hexdigest()[:12]

        def write(directory: Path) -> None:
            checkpoints = importlib.import_module("checkpoints")  # only now: it loads transformers
            checkpoints.write_checkpoint(directory, family, quant, **options)

        return written(f"{family}-{quant}-{key}", write)

    return get
