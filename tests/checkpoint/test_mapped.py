"""Mapped shards: the bytes that were written, with no copy, and refusals for whatever changed."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoint_files import write_shard
from safetensors.numpy import save_file

from hmc.checkpoint import Shard, TensorInfo, read_header
from hmc.checkpoint.mapped import MappedShards
from hmc.errors import ShardError

ARRAYS: dict[str, npt.NDArray[Any]] = {
    "bits8": np.arange(21, dtype=np.uint8).reshape(3, 7),
    "f32": np.linspace(-1, 1, 5, dtype=np.float32),
    "i32": np.array([[-1, 2]], np.int32),
    "i64": np.array([3, -4], np.int64),
    "f16": np.array([0.5, -2], np.float16),
}


def written(directory: Path) -> Shard:
    save_file(ARRAYS, directory / "a.safetensors")
    return read_header(directory / "a.safetensors")


def mapped(directory: Path, shard: Shard) -> MappedShards:
    return MappedShards(directory, [(shard.name, shard.size)])


def test_tensors_and_addresses(tmp_path: Path) -> None:
    shard = written(tmp_path)
    with mapped(tmp_path, shard) as shards:
        for name, array in ARRAYS.items():
            info = shard.tensors[name]
            view = shards.tensor(info)
            assert view.tobytes() == array.tobytes()
            assert view.shape == array.shape
            assert not view.flags.owndata
            assert not view.flags.writeable
            address = shards.address(0, info.offset, info.nbytes)
            assert address == view.ctypes.data
            assert ctypes.string_at(address, info.nbytes) == array.tobytes()
        np.testing.assert_array_equal(shards.tensor(shard.tensors["f32"]), ARRAYS["f32"])
        assert shards.tensor(shard.tensors["f16"]).dtype == np.uint16


def test_unaligned_view(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x", {"a": ("U8", (9,))})
    size = path.stat().st_size
    with MappedShards(tmp_path, [("x", size)]) as shards:
        view = shards.array(0, 3, np.float32, (2,))
        assert view.tobytes() == path.read_bytes()[3:11]


def test_nothing_is_opened_before_it_is_used(tmp_path: Path) -> None:
    shard = written(tmp_path)
    with MappedShards(tmp_path, [(shard.name, shard.size), ("absent", 8)]) as shards:
        assert shards.tensor(shard.tensors["f32"]).size == 5
        with pytest.raises(ShardError, match="absent: shard is missing"):
            shards.address(1, 0, 8)
        with pytest.raises(ShardError, match="absent: shard is missing"):
            shards.check()


def test_changed_size(tmp_path: Path) -> None:
    shard = written(tmp_path)
    with mapped(tmp_path, shard) as shards:
        shards.check()
        with open(tmp_path / shard.name, "ab") as file:
            file.write(b"x")
        for call in (shards.check, lambda: shards.address(0, 0, 1)):
            with pytest.raises(ShardError, match=r"a\.safetensors: has .* the checkpoint changed"):
                call()


def test_file_that_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "folder").mkdir()
    shards = MappedShards(tmp_path, [("folder", 1), ("empty", 0)])
    with pytest.raises(ShardError, match="folder: cannot be mapped: Is a directory"):
        shards.address(0, 0, 1)
    with pytest.raises(ShardError, match="empty: cannot be mapped: the file is empty"):
        shards.address(1, 0, 0)


def test_ranges_outside_a_shard(tmp_path: Path) -> None:
    shard = written(tmp_path)
    size = shard.size
    with mapped(tmp_path, shard) as shards:
        for offset, nbytes in ((size, 1), (-1, 1), (0, size + 1), (0, -1)):
            with pytest.raises(ShardError, match="lie outside its"):
                shards.address(0, offset, nbytes)
        with pytest.raises(ShardError, match="lie outside its"):
            shards.array(0, size - 4, np.float32, (2,))
        with pytest.raises(ShardError, match="no shard number 1"):
            shards.address(1, 0, 1)
        with pytest.raises(ShardError, match="no shard number -1"):
            shards.address(-1, 0, 1)
        with pytest.raises(ShardError, match="tensor t is F64, which hmc does not read"):
            shards.tensor(TensorInfo("t", 0, "F64", (1,), 0, 8))


def test_close(tmp_path: Path) -> None:
    shard = written(tmp_path)
    shards = mapped(tmp_path, shard)
    view = shards.tensor(shard.tensors["f32"])
    shards.close()
    shards.close()
    np.testing.assert_array_equal(view, ARRAYS["f32"])  # its mapping lives as long as it does
    with pytest.raises(ShardError, match="closed already"):
        shards.address(0, 0, 1)
