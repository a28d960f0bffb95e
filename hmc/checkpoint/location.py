"""Where a checkpoint is: a model directory, or a GGUF file (of a split one the first part)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

GGUF_SUFFIX = ".gguf"

_PART = re.compile(r"-\d{5}-of-\d{5}$")


def is_gguf(location: Path) -> bool:
    """Whether a checkpoint is a GGUF file, as its name says."""
    return location.suffix.lower() == GGUF_SUFFIX


def model_name(location: Path) -> str:
    """What a model is called, by where it lies: a directory or a GGUF file (without the number of
    its part); "model" where that has no name.
    """
    name = location.stem if is_gguf(location) else location.absolute().name
    return _PART.sub("", name) or "model"


def shard_paths(location: Path, names: Sequence[str]) -> list[Path]:
    """The shards of a checkpoint: in its directory, or a GGUF file (under whatever name) and its
    other parts beside it.
    """
    if not is_gguf(location):
        return [location / name for name in names]
    return [location] if len(names) == 1 else [location.with_name(name) for name in names]
