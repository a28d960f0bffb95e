"""The files of a model: one, or the parts of a split, `NAME-00001-of-0000N.gguf`, of which the
first has the metadata.
"""

from __future__ import annotations

import re
from pathlib import Path

from hmc.checkpoint.gguf.header import GgufFile, read_gguf
from hmc.checkpoint.jsonfile import first_few, quote
from hmc.errors import ShardError, TensorError

_PART = re.compile(r"(.*-)(\d{5})-of-(\d{5})(\.gguf)")
_MOST_PARTS = 10_000


def read_files(first: Path) -> tuple[GgufFile, ...]:
    """Every file of the model that `first` begins, read and checked.

    Raises `ShardError` for a file that is absent or not the part it should be, `TensorError` for
    tensors that stand in two of them or are missing.
    """
    head = read_gguf(first)
    count, number = _split(head)
    if count == 1:
        return (head,)
    if number != 0:
        raise ShardError(f"{first}: part {number + 1} of {count}: pass the first part")
    files = [head]
    paths = _parts(first, count)
    missing = [path.name for path in paths if not path.exists()]
    if missing:
        raise ShardError(
            f"{first}: {len(missing)} of {count} parts are missing: {first_few(missing)}"
        )
    for index, path in enumerate(paths[1:], 1):
        part = read_gguf(path, index)
        if _split(part) != (count, index):
            raise ShardError(
                f"{path}: says it is part {_split(part)[1] + 1} of {_split(part)[0]},"
                f" not {index + 1} of {count}: the name or the header lies"
            )
        files.append(part)
    _check_tensors(first, files)
    return tuple(files)


def _split(file: GgufFile) -> tuple[int, int]:
    """(files of the model, the number of this one, from 0)."""
    settings = file.settings
    count = settings.get_int("split.count", 1, minimum=0) or 1
    number = settings.get_int("split.no", 0, minimum=0)
    if number >= count or count > _MOST_PARTS:
        raise ShardError(f"{file.path}: split.no is {number}, split.count {count}: no such part")
    return count, number


def _parts(first: Path, count: int) -> list[Path]:
    match = _PART.fullmatch(first.name)
    if match is None or (int(match[2]), int(match[3])) != (1, count):
        raise ShardError(
            f"{first}: the first of {count} parts, whose name must end in -00001-of-{count:05}.gguf"
        )
    stem, _, _, end = match.groups()
    return [
        first.with_name(f"{stem}{number:05}-of-{count:05}{end}") for number in range(1, count + 1)
    ]


def _check_tensors(first: Path, files: list[GgufFile]) -> None:
    seen: dict[str, Path] = {}
    for file in files:
        for tensor in file.tensors:
            if tensor.name in seen:
                raise TensorError(
                    f"{file.path}: tensor {quote(tensor.name)} stands in {seen[tensor.name].name}"
                    " too"
                )
            seen[tensor.name] = file.path
    expected = files[0].settings.get_int("split.tensors.count", len(seen), minimum=0)
    if expected != len(seen):
        raise TensorError(f"{first}: its parts have {len(seen)} tensors, not {expected}")
