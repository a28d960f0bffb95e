"""A few hundred changed files for every reader of checkpoints (fuzz_readers.py has more time)."""

from __future__ import annotations

from pathlib import Path

import pytest
from fuzz_readers import failure, fuzz
from fuzz_seeds import READERS, Reader

from hmc.errors import ConfigError

FILES = {"safetensors": 60, "index": 60, "quantization": 40, "config": 20, "gguf": 40}


@pytest.mark.parametrize("name", READERS)
def test_changed_files(name: str) -> None:
    tried, failures = fuzz(name, seed=7, files=FILES[name])
    assert tried == FILES[name] and not failures, failures[0]


def _raises(error: BaseException) -> Reader:
    def read(directory: Path) -> None:
        raise error

    return Reader("a", read, list)


def _waits(directory: Path) -> None:
    while True:
        pass


def test_failures_are_seen(tmp_path: Path) -> None:
    for error, said in ((KeyError("a"), "KeyError"), (ConfigError("a\nb"), "that is no line")):
        assert said in failure(_raises(error), tmp_path, b"")
    assert failure(_raises(ConfigError("one line")), tmp_path, b"") == ""
    assert "TooSlow" in failure(Reader("a", _waits, list), tmp_path, b"", seconds=0.1)
    greedy = Reader("a", lambda directory: bytes(1 << 20), list, megabytes=0)
    assert "bytes for a file of 1" in failure(greedy, tmp_path, b"a")
