"""Headers of safetensors shards: what a file says it holds, believed only after it was checked.

A shard is an 8-byte little-endian length, that many bytes of JSON, then the data of all tensors
back to back (https://github.com/huggingface/safetensors, "Format"). Only the first two parts are
read, so a shard of any size costs its header. After `read_header` every byte range lies inside the
file, none overlap, and each is exactly as long as its dtype and shape say.
"""

from __future__ import annotations

import hashlib
import os
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hmc.checkpoint.jsonfile import parse_object, quote
from hmc.errors import ShardError
from hmc.formats import DTYPE_BITS

HEADER_CAP = 100_000_000
"""Longest header in bytes; the reference reader refuses longer ones too."""

_LFS_POINTER = b"version https://git-lfs"
_LARGEST = 2**63 - 1


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `nbytes` bytes at `offset` of the file of shard number `shard`.

    `dtype` is the safetensors spelling ("BF16", "F8_E4M3", ...), `offset` counts from the start of
    the file, and `shard` indexes the sorted list of shard names.
    """

    name: str
    shard: int
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class ShardInfo:
    """One safetensors file, and what tells it from another without reading its data: its `size`,
    and the hex digest of its first `header_bytes` bytes, the length field and the JSON after it.
    They pin every offset in it.
    """

    name: str
    size: int
    header_bytes: int
    header_sha256: str


def read_header(path: Path | str, index: int = 0) -> tuple[ShardInfo, dict[str, TensorInfo]]:
    """Read and check the header of one shard; its tensors by name, in file order. `index` becomes
    `TensorInfo.shard`.

    Raises `ShardError` naming the file, and the tensor where there is one, for whatever is wrong.
    """
    path = Path(path)
    header, shard = _read_raw(path)
    table = parse_object(header[8:], f"{path}: header", ShardError)
    _check_metadata(table.pop("__metadata__", None), path)
    tensors = _read_entries(table, path, index, shard.header_bytes, shard.size)
    return shard, {tensor.name: tensor for tensor in tensors}


def read_fingerprint(path: Path | str, header_bytes: int = 0) -> ShardInfo:
    """Size and header digest of a shard, unparsed: enough to see that it is still the same one. Of
    a file whose header is not safetensors' it has to be said how long that was, `header_bytes`.
    """
    return _read_raw(Path(path), header_bytes)[1]


def _read_raw(path: Path, header_bytes: int = 0) -> tuple[bytes, ShardInfo]:
    """Length field and JSON text as one byte string, the length checked against the file; or just
    so many bytes.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # before open: that of a pipe would block
            raise ShardError(f"{path}: not a regular file")
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            wanted = min(header_bytes, size)
            if not header_bytes:
                wanted = 8 + _header_length(path, file.read(len(_LFS_POINTER)), size)
                file.seek(0)
            header = file.read(wanted)
    except FileNotFoundError:
        raise ShardError(f"{path}: shard is missing") from None
    except OSError as problem:
        raise ShardError(f"{path}: cannot be read: {problem.strerror}") from None
    if len(header) != wanted:
        raise ShardError(f"{path}: truncated while being read")
    return header, ShardInfo(path.name, size, len(header), hashlib.sha256(header).hexdigest())


def _header_length(path: Path, start: bytes, size: int) -> int:
    if size == 0:
        raise ShardError(f"{path}: the file is empty")
    if start == _LFS_POINTER:
        raise ShardError(f"{path}: a Git LFS pointer, not the data: run `git lfs pull`")
    if size < 8:
        raise ShardError(f"{path}: truncated: {size} bytes do not even hold the header's length")
    length = int.from_bytes(start[:8], "little")
    if length > HEADER_CAP:
        raise ShardError(
            f"{path}: says its header is {length} bytes long, over the cap of {HEADER_CAP}:"
            " not a safetensors file, or damaged"
        )
    if 8 + length > size:
        raise ShardError(
            f"{path}: truncated: says its header is {length} bytes long, the file has {size}"
        )
    return length


def _check_metadata(metadata: Any, path: Path) -> None:
    if metadata is None:
        return
    if type(metadata) is not dict or not all(type(text) is str for text in metadata.values()):
        raise ShardError(f"{path}: header: __metadata__ is not a table of strings")


def _read_entries(
    table: dict[str, Any], path: Path, index: int, header_bytes: int, size: int
) -> list[TensorInfo]:
    """Every entry checked by itself, then all of them against the file.

    One plain loop: 90,000 entries are read on every compile of a large model.
    """
    tensors: list[TensorInfo] = []
    for name, entry in table.items():
        try:
            dtype, shape = entry["dtype"], entry["shape"]
            begin, end = entry["data_offsets"]
            bits = DTYPE_BITS[dtype]
        except (KeyError, TypeError, ValueError):
            raise _bad_entry(path, name, entry) from None
        count = 1
        for size_of_dim in shape if type(shape) is list else (None,):
            if type(size_of_dim) is not int or size_of_dim < 0:
                raise _bad(path, name, f"shape {quote(shape)} is not a list of sizes")
            count *= size_of_dim
            if count > _LARGEST or size_of_dim > _LARGEST:
                raise _bad(path, name, f"shape {quote(shape)} overflows")
        if type(begin) is not int or type(end) is not int or not 0 <= begin <= end:
            raise _bad(path, name, f"data_offsets {quote([begin, end])} are not a byte range")
        if header_bytes + end > size:
            raise _bad(
                path,
                name,
                f"ends at byte {header_bytes + end if end <= _LARGEST else 'over 2**63'} of a file"
                f" of {size}: a truncated shard, or a header that lies",
            )
        if (end - begin) * 8 != count * bits:
            raise _bad(
                path,
                name,
                f"takes {end - begin} bytes, but {dtype} of shape {quote(shape)} needs"
                f" {count * bits / 8:.0f}",
            )
        if not name.isascii() or name == "":
            _check_name(path, name)
        tensors.append(
            TensorInfo(name, index, dtype, tuple(shape), header_bytes + begin, end - begin)
        )
    _check_layout(tensors, path, header_bytes, size)
    return tensors


def _check_layout(tensors: list[TensorInfo], path: Path, header_bytes: int, size: int) -> None:
    """The format wants data back to back, from the header to the end of the file."""
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.nbytes))
    end, previous = header_bytes, "the header"
    for tensor in tensors:
        if tensor.offset != end:
            if tensor.offset < end:
                raise _bad(path, tensor.name, f"overlaps {quote(previous)}")
            gap = tensor.offset - end
            raise _bad(path, tensor.name, f"leaves a hole of {gap} bytes after {previous}")
        end, previous = tensor.offset + tensor.nbytes, tensor.name
    if end != size:
        raise ShardError(
            f"{path}: {size - end} bytes after the last tensor belong to none: the header lies"
        )


def _bad_entry(path: Path, name: str, entry: Any) -> ShardError:
    """Say which part of an entry could not even be taken apart."""
    if type(entry) is not dict:
        return _bad(path, name, f"described by {quote(entry)}, not by an object")
    for key in ("dtype", "shape", "data_offsets"):
        if key not in entry:
            return _bad(path, name, f"has no {key}")
    dtype, offsets = entry["dtype"], entry["data_offsets"]
    if type(dtype) is not str or dtype not in DTYPE_BITS:
        return _bad(path, name, f"unknown dtype {quote(dtype)}")
    return _bad(path, name, f"data_offsets {quote(offsets)} are not a byte range")


def _check_name(path: Path, name: str) -> None:
    if not name:
        raise _bad(path, name, "a tensor needs a name")
    try:
        name.encode("utf-8")
    except UnicodeEncodeError:
        raise _bad(path, name, "the name is not valid Unicode") from None


def _bad(path: Path, name: str, problem: str) -> ShardError:
    return ShardError(f"{path}: tensor {quote(name)}: {problem}")
