"""The shards of a model directory. Hides how a checkpoint is spread over files: one shard, several
with an index, several without. Only the index and the headers are read, and known to agree then.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from hmc.checkpoint.headers import ShardInfo, TensorInfo, read_header
from hmc.checkpoint.jsonfile import first_few, quote, read_object
from hmc.checkpoint.location import is_gguf
from hmc.errors import CheckpointError, ConfigError, ShardError, TensorError, UsageError

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
_NUMBERED = re.compile(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)")


def local_directory(argument: str) -> Path:
    """The directory that is there; `UsageError` says what is there instead."""
    path = Path(argument)
    try:
        if path.is_dir():
            return path
        exists = path.exists()
    except OSError as problem:
        raise UsageError(f"{quote(argument)}: cannot be looked up: {problem.strerror}") from None
    if exists:
        raise UsageError(
            f"{argument}: a file; pass the model directory that holds config.json, or a .gguf file"
        )
    if _HUB_ID.fullmatch(argument):
        raise UsageError(
            f"{argument}: no such directory; if it is a hub id, `hmc compile {argument}` fetches it"
        )
    raise UsageError(f"{quote(argument)}: no such directory")


def shard_names(directory: Path) -> tuple[list[str], dict[str, str] | None]:
    """The files of a checkpoint that hold its weights, and what the index says where there is one;
    found as transformers does: one file, else the index, else whatever shards there are. That the
    files exist is all that is asked of them.
    """
    index = directory / INDEX_NAME
    if (directory / SINGLE_NAME).exists():
        return [SINGLE_NAME], None
    if not index.exists():
        return _list_shards(directory), None
    weight_map = _read_index(index)
    names = sorted(set(weight_map.values()))
    _require_files(directory, names, f"named by {INDEX_NAME}")
    return names, weight_map


def read_shards(directory: Path) -> tuple[tuple[ShardInfo, ...], dict[str, TensorInfo]]:
    """All shards of a checkpoint by name, and their tensors."""
    names, weight_map = shard_names(directory)
    shards: list[ShardInfo] = []
    tensors: dict[str, TensorInfo] = {}
    for number, file in enumerate(names):
        shard, found = read_header(directory / file, number)
        if twice := tensors.keys() & found.keys():
            name, what = min(twice), "tensor stands" if len(twice) == 1 else "tensors stand"
            raise TensorError(
                f"{directory}: {len(twice)} {what} in two shards: {quote(name)} in"
                f" {shards[tensors[name].shard].name} and {shard.name}"
            )
        shards.append(shard)
        tensors.update(found)
    if weight_map is not None:
        _compare(directory / INDEX_NAME, weight_map, shards, tensors)
    return tuple(shards), tensors


def _read_index(path: Path) -> dict[str, str]:
    weight_map = read_object(path, ConfigError).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConfigError(f"{path}: weight_map is missing, empty or not an object")
    for name in weight_map.values():
        if type(name) is not str:
            raise ConfigError(f"{path}: weight_map names shard {quote(name)}, not a string")
    for name in set(weight_map.values()):
        if Path(name).name != name or not name.endswith(".safetensors") or not name.isprintable():
            raise ConfigError(
                f"{path}: weight_map names shard {quote(name)}, not a .safetensors file here"
            )
    return weight_map


def _list_shards(directory: Path) -> list[str]:
    try:
        files = sorted(entry.name for entry in directory.iterdir())
    except OSError as problem:
        raise CheckpointError(f"{directory}: cannot be listed: {problem.strerror}") from None
    names = [name for name in files if name.endswith(".safetensors")]
    if not names:
        others = [name for name in files if name.endswith((".bin", ".pt", ".pth"))]
        hint = f" ({first_few(others, 1)} is of a format hmc does not read)" if others else ""
        if ggufs := [name for name in files if is_gguf(Path(name))]:
            hint = f" (pass the GGUF file itself: {directory / ggufs[0]})"
        raise ShardError(f"{directory}: no .safetensors shard in it{hint}")
    expected: dict[str, None] = {}
    for name in names:
        if match := _NUMBERED.fullmatch(name):
            stem, digits, of, total, end = match.groups()
            if int(total) <= 100_000:
                width = len(digits)
                for number in range(1, int(total) + 1):
                    expected[f"{stem}{number:0{width}d}{of}{total}{end}"] = None
    _require_files(directory, list(expected), "implied by the others' names")
    return names


def _require_files(directory: Path, names: list[str], reason: str) -> None:
    missing = [name for name in names if not os.path.exists(directory / name)]
    if missing:
        raise ShardError(
            f"{directory}: {len(missing)} of {len(names)} shards {reason} missing:"
            f" {first_few(missing)}"
        )


def _compare(
    index: Path,
    weight_map: dict[str, str],
    shards: list[ShardInfo],
    tensors: dict[str, TensorInfo],
) -> None:
    """Name each way in which the index and the headers disagree, in one line."""
    absent, elsewhere = [], []
    for name, shard in weight_map.items():
        tensor = tensors.get(name)
        if tensor is None:
            absent.append(f"{name} ({shard})")
        elif shards[tensor.shard].name != shard:
            elsewhere.append(f"{name} ({shards[tensor.shard].name}, not {shard})")
    unlisted = [
        f"{name} ({shards[tensors[name].shard].name})"
        for name in sorted(tensors.keys() - weight_map.keys())
    ]
    problems = [
        f"{len(found)} {what}: {first_few(found)}"
        for found, what in (
            (absent, "listed but in no shard"),
            (elsewhere, "listed for the wrong shard"),
            (unlisted, "in a shard but not listed"),
        )
        if found
    ]
    if problems:
        raise TensorError(f"{index}: index and shards disagree: {'; '.join(problems)}")
