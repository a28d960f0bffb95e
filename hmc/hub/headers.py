"""A folder that looks like a model of the hub to the compiler: files that describe it, and of its
weights the headers, in files as long as the real ones with a hole instead of the data.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from hmc.checkpoint.directory import shard_names
from hmc.checkpoint.gguf import parse_gguf, settings_of
from hmc.checkpoint.headers import HEADER_CAP
from hmc.checkpoint.location import is_gguf
from hmc.errors import CheckpointError, CompileError, HubError, PlanMismatchError
from hmc.hub import cache
from hmc.hub.fetch import Report
from hmc.hub.listing import HubFile, Listing
from hmc.hub.ranges import read
from hmc.hub.wanted import Wanted

_AT_ONCE = 8
_FIRST = 1 << 16
"""Bytes of the first request; many headers are shorter."""


@dataclass(frozen=True)
class Headers:
    """`location` is what the compiler opens, a directory or a GGUF file; `weights` are the files
    that it has read the headers of.
    """

    location: Path
    weights: tuple[HubFile, ...]


@contextmanager
def headers(listing: Listing, wanted: Wanted, report: Report) -> Iterator[Headers]:
    """The folder, for the length of a `with`; errors about a file in it name the model instead.

    Small files are in the cache already, and so may be weights: what is there is not read again.
    """
    with tempfile.TemporaryDirectory(prefix="hmc-hub-") as name:
        folder = Path(name)
        try:
            yield Headers(folder / wanted.gguf, _written(listing, wanted, folder, report))
        except (CheckpointError, CompileError, PlanMismatchError) as error:
            said = str(error).replace(str(folder), listing.name.repo)
            raise type(error)(said) from error


def _written(listing: Listing, wanted: Wanted, folder: Path, report: Report) -> tuple[HubFile, ...]:
    """Fill the folder; which files of weights are in it."""
    try:
        for file in wanted.small:
            _link(listing, file, folder)
        weights = wanted.weights if wanted.gguf else _shards(folder, wanted)
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # each takes the way to the hub and back
            done = pool.map(lambda file: _header(listing, file, folder), weights)
            for number, _ in enumerate(done, 1):
                report("reading headers", number, len(weights))
    except OSError as error:
        reason = error.strerror or error
        raise HubError(f"{folder}: cannot be written: {reason}") from error
    return weights


def _shards(folder: Path, wanted: Wanted) -> tuple[HubFile, ...]:
    """Those of the weights that the model is made of: often there are others beside them."""
    if not wanted.weights:
        return ()
    for file in wanted.weights:
        (folder / file.name).touch()
    names, _ = shard_names(folder)
    for file in wanted.weights:
        (folder / file.name).unlink()
    return tuple(file for file in wanted.weights if file.name in names)


def _header(listing: Listing, file: HubFile, folder: Path) -> None:
    target = folder / file.name
    target.parent.mkdir(parents=True, exist_ok=True)
    if _link(listing, file, folder):
        return
    with target.open("wb") as out:
        gguf = is_gguf(target)
        parts = _of_gguf(listing, file, target) if gguf else _of_shard(listing, file)
        for begin, data in parts:
            out.seek(begin)
            out.write(data)
    os.truncate(target, file.size)


def _link(listing: Listing, file: HubFile, folder: Path) -> bool:
    """Whether a file is in the cache; then a link to it stands in the folder."""
    snapshot = cache.snapshot(listing.name.repo, listing.commit) / file.name
    for path in (snapshot, cache.blob(listing.name.repo, file.etag)):
        if path.exists():
            (folder / file.name).symlink_to(path.resolve())
            return True
    return False


def _of_shard(listing: Listing, file: HubFile) -> Iterator[tuple[int, bytes]]:
    """The header of a safetensors shard; a length that makes no sense is left to the reader."""
    start = read(listing, file, 0, min(_FIRST, file.size))
    yield 0, start
    length = 8 + int.from_bytes(start[:8], "little")
    if len(start) < length <= min(file.size, HEADER_CAP):
        yield len(start), read(listing, file, len(start), length)


def _of_gguf(listing: Listing, file: HubFile, path: Path) -> Iterator[tuple[int, bytes]]:
    """That of a GGUF file, which ends where its parts say, and the short tensors that the compiler
    reads.
    """
    begun: list[bytes] = []

    def next_piece(count: int) -> bytes:
        at = sum(map(len, begun))
        begun.append(read(listing, file, at, min(file.size, at + max(count, at))))
        return begun[-1]

    head = parse_gguf(path, file.size, next_piece)
    yield 0, b"".join(begun)
    for tensor in settings_of(head):
        end = tensor.offset + tensor.nbytes
        yield tensor.offset, read(listing, file, tensor.offset, end)
