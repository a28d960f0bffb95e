"""Mapped shards: the bytes that were written, with no copy, and refusals for whatever changed."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
from checkpoint_files import write_shard

from hmc.checkpoint import ShardInfo, read_fingerprint
from hmc.checkpoint.mapped import MappedShards
from hmc.errors import ShardError


def written(directory: Path, name: str) -> ShardInfo:
    return read_fingerprint(write_shard(directory / name, {"a": ("U8", (9,)), "b": ("F32", (5,))}))


def test_addresses(tmp_path: Path) -> None:
    shards = [written(tmp_path, name) for name in ("a.safetensors", "b.safetensors")]
    with MappedShards(tmp_path, shards) as mapped:
        for shard, address in zip(shards, mapped.addresses, strict=True):
            assert ctypes.string_at(address, shard.size) == (tmp_path / shard.name).read_bytes()
    mapped.close()


def refusal(directory: Path, *shards: ShardInfo) -> str:
    with pytest.raises(ShardError) as caught:
        MappedShards(directory, shards)
    return str(caught.value)


def test_changed_or_absent(tmp_path: Path) -> None:
    shard = written(tmp_path, "a.safetensors")
    assert "absent: shard is missing" in refusal(tmp_path, shard, ShardInfo("absent", 8, 8, ""))
    with open(tmp_path / shard.name, "ab") as file:
        file.write(b"x")
    text = refusal(tmp_path, shard)
    assert "a.safetensors: has" in text and "the checkpoint changed" in text


def test_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    folder, empty = ShardInfo("folder", 1, 0, ""), ShardInfo("empty", 0, 0, "")
    assert "folder: cannot be mapped: Is a directory" in refusal(tmp_path, folder)
    assert "empty: cannot be mapped: the file is empty" in refusal(tmp_path, empty)
