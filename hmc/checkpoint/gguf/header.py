"""Headers of GGUF files: what a file says it holds, believed only after it was checked.

A file is a magic, a version, counts, metadata by key, where each tensor lies, and the data of all
tensors (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md). Only what is before the data is
read, in pieces, so memory is bounded by that part of the file. After `read_gguf` every byte range
lies inside the file, none overlap, and each is as long as its type and shape say.
"""

from __future__ import annotations

import hashlib
import os
import stat
import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmc.checkpoint.config import ModelConfig
from hmc.checkpoint.headers import ShardInfo, TensorInfo
from hmc.checkpoint.jsonfile import quote
from hmc.errors import ShardError, UnsupportedError
from hmc.formats.ggml import GGML_TYPES

HEADER_CAP = 1 << 28
"""Longest header in bytes; those of vocabularies of 200,000 tokens have 10 MB."""

_MAGIC = b"GGUF"
_VERSIONS = (2, 3)
_PIECE = 1 << 20
_LARGEST = 2**63 - 1
_MOST_DIMENSIONS = 4
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q",
            12: "d"}  # fmt: skip
"""Metadata types of one number by their `struct` code."""
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class GgufFile:
    """One file: what it is known by, its metadata and its tensors, in file order.

    Metadata are numbers, booleans, strings, lists of strings, and arrays of numbers (as
    `memoryview`s). A 32-bit float has the shortest decimal that rounds to it.
    """

    path: Path
    shard: ShardInfo
    metadata: Mapping[str, Any]
    tensors: tuple[TensorInfo, ...]

    @property
    def settings(self) -> ModelConfig:
        """The metadata behind typed getters."""
        return ModelConfig(self.path, self.metadata, self.shard.header_sha256)


def read_gguf(path: Path, index: int = 0) -> GgufFile:
    """Read and check the header of one file; `index` becomes `TensorInfo.shard`.

    Raises `ShardError` naming the file, and the key or tensor where there is one, for whatever is
    wrong; `UnsupportedError` for a version of the format that is not read.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open: that of a pipe would block
            raise ShardError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            return parse_gguf(path, os.fstat(file.fileno()).st_size, file.read, index)
    except FileNotFoundError:
        raise ShardError(f"{path}: no such file") from None
    except OSError as problem:
        raise ShardError(f"{path}: cannot be read: {problem.strerror}") from None


def parse_gguf(path: Path, size: int, read: Callable[[int], bytes], index: int = 0) -> GgufFile:
    """`read_gguf` of a file of `size` bytes that `read(count)` gives from its beginning on, `count`
    of them or, at its end, fewer.
    """
    return _read(_Cursor(path, size, read), index)


class _Cursor:
    """Reads numbers and strings one after the other; `bytes` is all that was read so far."""

    def __init__(self, path: Path, size: int, read: Callable[[int], bytes]) -> None:
        self.path, self.size, self._read = path, size, read
        self.bytes = bytearray()
        self.at = 0

    @property
    def left(self) -> int:
        """Bytes of the file behind what was taken."""
        return self.size - self.at

    def take(self, count: int, what: str) -> int:
        """Step over `count` bytes that are there then; where they begin."""
        begin, end = self.at, self.at + count
        if end > len(self.bytes):
            self._fill(end, what)
        self.at = end
        return begin

    def number(self, code: str, what: str) -> Any:
        """The number of a `struct` code."""
        (value,) = struct.unpack_from(
            "<" + code, self.bytes, self.take(struct.calcsize("<" + code), what)
        )
        return value

    def string(self, what: str) -> str:
        """A string, its length before it."""
        length = self.number("Q", what)
        begin = self.take(length, what)
        try:
            return self.bytes[begin : self.at].decode("utf-8")
        except UnicodeDecodeError:
            raise ShardError(f"{self.path}: {what}: not UTF-8") from None

    def _fill(self, end: int, what: str) -> None:
        if end > self.size:
            raise ShardError(
                f"{self.path}: {what}: ends at byte {end if end <= _LARGEST else 'over 2**63'} of a"
                f" file of {self.size}: truncated, or a header that lies"
            )
        if end > HEADER_CAP:
            raise ShardError(
                f"{self.path}: {what}: the header is over the cap of {HEADER_CAP} bytes: damaged"
            )
        self.bytes += self._read(max(end - len(self.bytes), _PIECE))
        if end > len(self.bytes):
            raise ShardError(f"{self.path}: truncated while being read")


def _read(cursor: _Cursor, index: int) -> GgufFile:
    tensor_count, key_count = _read_start(cursor)
    metadata: dict[str, Any] = {}
    for _ in range(key_count):
        key = cursor.string("a metadata key")
        if key in metadata:
            raise ShardError(f"{cursor.path}: metadata key {quote(key)} stands there twice")
        metadata[key] = _read_value(cursor, key)
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
        raise ShardError(
            f"{cursor.path}: general.alignment is {quote(alignment)}, must be a power of two"
        )
    entries = [_read_entry(cursor) for _ in range(tensor_count)]
    header = bytes(memoryview(cursor.bytes)[: cursor.at])
    digest = hashlib.sha256(header).hexdigest()
    shard = ShardInfo(cursor.path.name, cursor.size, len(header), digest)
    start = -(-len(header) // alignment) * alignment
    tensors = [_placed(cursor, entry, start, alignment, index) for entry in entries]
    _check_layout(cursor.path, tensors)
    return GgufFile(cursor.path, shard, metadata, tuple(tensors))


def _read_start(cursor: _Cursor) -> tuple[int, int]:
    """(tensors, metadata keys), both no more than the file could hold."""
    path = cursor.path
    if cursor.size == 0:
        raise ShardError(f"{path}: the file is empty")
    begin = cursor.take(min(4, cursor.size), "the magic")
    if cursor.bytes[begin:4] != _MAGIC:
        lfs = cursor.bytes.startswith(b"version https://git-lfs")
        raise ShardError(
            f"{path}: " + ("a Git LFS pointer, not the data: run `git lfs pull`" if lfs
                           else "not a GGUF file")
        )  # fmt: skip
    version = cursor.number("I", "the version")
    if version not in _VERSIONS:
        swapped = int.from_bytes(version.to_bytes(4, "little"), "big")
        what = "big-endian" if swapped in _VERSIONS else f"GGUF of version {version}"
        raise UnsupportedError(f"{path}: {what}; hmc reads versions 2 and 3, little-endian")
    tensors, keys = cursor.number("Q", "the counts"), cursor.number("Q", "the counts")
    for count, least, what in ((keys, 13, "metadata keys"), (tensors, 24, "tensors")):
        if count * least > cursor.left:
            raise ShardError(f"{path}: says it has {count} {what}, more than the file could hold")
    return tensors, keys


def _read_value(cursor: _Cursor, key: str) -> Any:
    what = f"metadata {quote(key)}"
    kind = cursor.number("I", what)
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _read_array(cursor, what)
    if kind not in _SCALARS:
        raise ShardError(f"{cursor.path}: {what} has the unknown type {kind}")
    value = cursor.number(_SCALARS[kind], what)
    return _shortest(value) if _SCALARS[kind] == "f" else value


def _read_array(cursor: _Cursor, what: str) -> Any:
    kind, count = cursor.number("I", what), cursor.number("Q", what)
    if kind == _STRING:
        if count * 8 > cursor.left:
            raise ShardError(f"{cursor.path}: {what} has {count} strings, more than the file holds")
        return [cursor.string(what) for _ in range(count)]
    if kind not in _SCALARS:
        raise ShardError(f"{cursor.path}: {what} is an array of the unknown type {kind}")
    code = _SCALARS[kind]
    begin = cursor.take(count * struct.calcsize("<" + code), what)
    return memoryview(bytes(cursor.bytes[begin : cursor.at])).cast(code)  # type: ignore[call-overload]


def _shortest(value: float) -> float:
    """The shortest decimal that a 32-bit float is nearest to: 1e-05, where 1e-05 was written."""
    if value - value:  # infinite, or no number
        return value
    for digits in range(1, 9):
        text = f"{value:.{digits}g}"
        if struct.unpack("<f", struct.pack("<f", float(text)))[0] == value:
            return float(text)
    return value


@dataclass(frozen=True)
class _Entry:
    name: str
    dimensions: tuple[int, ...]
    kind: int
    offset: int


def _read_entry(cursor: _Cursor) -> _Entry:
    name = cursor.string("a tensor's name")
    what = f"tensor {quote(name)}"
    count = cursor.number("I", what)
    if not 1 <= count <= _MOST_DIMENSIONS:
        raise ShardError(f"{cursor.path}: {what}: {count} dimensions, must be 1 to 4")
    dimensions = tuple(cursor.number("Q", what) for _ in range(count))
    return _Entry(name, dimensions, cursor.number("I", what), cursor.number("Q", what))


def _placed(
    cursor: _Cursor, entry: _Entry, start: int, alignment: int, index: int
) -> TensorInfo:  # fmt: skip
    """A tensor's place in the file. Dimensions stand there with that of a row first."""

    def bad(problem: str) -> ShardError:
        return ShardError(f"{cursor.path}: tensor {quote(entry.name)}: {problem}")

    if not entry.name or not entry.name.isprintable():
        raise bad("a tensor needs a printable name")
    kind = GGML_TYPES.get(entry.kind)
    if kind is None:
        raise bad(f"has the unknown type {entry.kind}")
    count = 1
    for size in entry.dimensions:
        count *= size
        if not 0 < count <= _LARGEST:
            what = "overflow" if count else "nothing in it"
            raise bad(f"dimensions {list(entry.dimensions)}: {what}")
    if entry.dimensions[0] % kind.block:
        raise bad(
            f"rows of {entry.dimensions[0]} are no whole blocks of {kind.block}, as {kind.name} has"
        )
    nbytes = count // kind.block * kind.bytes
    if entry.offset % alignment:
        raise bad(f"begins at {entry.offset}, no multiple of the alignment of {alignment}")
    end = start + entry.offset + nbytes
    if end > cursor.size:
        raise bad(
            f"ends at byte {end if end <= _LARGEST else 'over 2**63'} of a file of {cursor.size}:"
            " truncated, or a header that lies"
        )
    # A row of blocks is one of bytes.
    across = entry.dimensions[0] // kind.block * (kind.bytes if kind.block > 1 else 1)
    shape = (*entry.dimensions[:0:-1], across)
    return TensorInfo(entry.name, index, kind.dtype, shape, start + entry.offset, nbytes)


def _check_layout(path: Path, tensors: list[TensorInfo]) -> None:
    names: set[str] = set()
    for tensor in tensors:
        if tensor.name in names:
            raise ShardError(f"{path}: tensor {quote(tensor.name)} stands there twice")
        names.add(tensor.name)
    end, previous = 0, ""
    for tensor in sorted(tensors, key=lambda tensor: (tensor.offset, tensor.nbytes)):
        if tensor.offset < end:
            raise ShardError(f"{path}: tensor {quote(tensor.name)}: overlaps {quote(previous)}")
        end, previous = tensor.offset + tensor.nbytes, tensor.name
