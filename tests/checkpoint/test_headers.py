"""Shard headers: what honest files give, and that no lie passes."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from checkpoint_files import entries, write_raw, write_shard, write_table
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from hmc.checkpoint import TensorInfo, read_fingerprint, read_header
from hmc.errors import ShardError

TWO = {"a": ("BF16", (2, 3)), "b": ("F32", (5,))}


def refusal(path: Path) -> str:
    """The one line `read_header` refuses `path` with; it names the file."""
    with pytest.raises(ShardError) as caught:
        read_header(path)
    text = str(caught.value)
    assert str(path) in text
    assert "\n" not in text
    assert len(text) < 500 + len(str(path))
    return text


def lie(path: Path, name: str, **changes: Any) -> Path:
    """A shard of TWO whose entry `name` is changed; 32 bytes of data follow."""
    table, size = entries(TWO)
    table[name] |= changes
    return write_table(path, table, size)


def test_honest_shard(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x.safetensors", TWO)
    shard, tensors = read_header(path, 7)
    raw = path.read_bytes()
    header_bytes = 8 + int.from_bytes(raw[:8], "little")
    assert (shard.name, shard.size) == ("x.safetensors", len(raw))
    assert shard.header_bytes == header_bytes
    assert shard.header_sha256 == hashlib.sha256(raw[:header_bytes]).hexdigest()
    assert tensors == {
        "a": TensorInfo("a", 7, "BF16", (2, 3), header_bytes, 12),
        "b": TensorInfo("b", 7, "F32", (5,), header_bytes + 12, 20),
    }
    assert read_fingerprint(path) == shard


def test_what_safetensors_writes(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrays: dict[str, npt.NDArray[Any]] = {
        "odd": rng.standard_normal((3, 5)).astype(np.float32),
        "half": rng.standard_normal(7).astype(np.float16),
        "bytes": rng.integers(0, 256, (1, 9), np.uint8),
        "scalar": np.array(3, np.int64),
        "nothing": np.zeros((0, 4), np.float32),
    }
    path = tmp_path / "model.safetensors"
    save_file(arrays, path, metadata={"format": "pt"})
    raw = path.read_bytes()
    _, tensors = read_header(path)
    assert tensors.keys() == arrays.keys()
    for name, array in arrays.items():
        info = tensors[name]
        assert info.shape == array.shape
        assert raw[info.offset : info.offset + info.nbytes] == array.tobytes()


def test_no_tensors_at_all(tmp_path: Path) -> None:
    assert read_header(write_raw(tmp_path / "x", b"{}"))[1] == {}


def test_absent(tmp_path: Path) -> None:
    assert "shard is missing" in refusal(tmp_path / "x")


def test_directory_and_pipe(tmp_path: Path) -> None:
    assert "not a regular file" in refusal(tmp_path)
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


def test_empty_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.touch()
    assert "the file is empty" in refusal(path)


def test_too_short_for_the_length(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"1234567")
    assert "truncated: 7 bytes" in refusal(path)


def test_git_lfs_pointer(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n")
    assert "git lfs pull" in refusal(path)


@pytest.mark.parametrize("length", [3, 99_999_999])
def test_length_beyond_the_file(tmp_path: Path, length: int) -> None:
    path = write_raw(tmp_path / "x", b"{}", length=length)
    assert f"says its header is {length} bytes long, the file has 10" in refusal(path)


@pytest.mark.parametrize("length", [100_000_001, 2**64 - 1])
def test_length_over_the_cap(tmp_path: Path, length: int) -> None:
    assert "over the cap of 100000000" in refusal(write_raw(tmp_path / "x", b"{}", length=length))


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        (b'{"a\xff": 1}', "not UTF-8 at byte 3"),
        (b"{]", "not valid JSON"),
        (b"", "not valid JSON"),
        (b"[]", "holds a JSON array, not an object"),
        (b"null", "holds a JSON null, not an object"),
        (b"17", "holds a JSON number, not an object"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": ' + b"9" * 5000 + b"}", "a number with too many digits"),
        (b'{"a": {}, "a": {}}', "'a' stands there twice"),
        (b'{"a": {"dtype": "U8", "dtype": "I8"}}', "'dtype' stands there twice"),
        (b'{"__metadata__": {"format": 1}}', "__metadata__ is not a table of strings"),
        (b'{"__metadata__": []}', "__metadata__ is not a table of strings"),
        (b'{"a": 5}', "tensor 'a': described by 5, not by an object"),
        (b'{"": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', "needs a name"),
        (b'{"\\ud800": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}', "valid Unicode"),
    ],
)
def test_header_text(tmp_path: Path, header: bytes, problem: str) -> None:
    assert problem in refusal(write_raw(tmp_path / "x", header))


@pytest.mark.parametrize("key", ["dtype", "shape", "data_offsets"])
def test_missing_key(tmp_path: Path, key: str) -> None:
    table, size = entries(TWO)
    del table["b"][key]
    assert f"tensor 'b': has no {key}" in refusal(write_table(tmp_path / "x", table, size))


@pytest.mark.parametrize("dtype", ["F7", "bf16", 3, None, ["F32"], {}])
def test_unknown_dtype(tmp_path: Path, dtype: Any) -> None:
    text = refusal(lie(tmp_path / "x", "b", dtype=dtype))
    assert f"tensor 'b': unknown dtype {dtype!r}" in text


@pytest.mark.parametrize("shape", [None, 5, "5", [-5], [5.0], [True], ["5"], {"5": 5}])
def test_bad_shape(tmp_path: Path, shape: Any) -> None:
    assert "is not a list of sizes" in refusal(lie(tmp_path / "x", "b", shape=shape))


@pytest.mark.parametrize("shape", [[2**63], [2**62, 4], [0, 2**64], [10**4000], [2] * 100])
def test_overflowing_shape(tmp_path: Path, shape: list[int]) -> None:
    assert "overflows" in refusal(lie(tmp_path / "x", "b", shape=shape))


@pytest.mark.parametrize(
    "offsets",
    [None, 12, [12], [12, 20, 32], ["12", "32"], [12.0, 32], [-12, 8], [32, 12], [True, 32], "ab"],
)
def test_bad_offsets(tmp_path: Path, offsets: Any) -> None:
    text = refusal(lie(tmp_path / "x", "b", data_offsets=offsets))
    assert "tensor 'b'" in text
    assert "are not a byte range" in text


@pytest.mark.parametrize("end", [33, 2**63, 2**64 + 5, 10**4000])
def test_offsets_outside_the_file(tmp_path: Path, end: int) -> None:
    text = refusal(lie(tmp_path / "x", "b", data_offsets=[12, end]))
    assert "tensor 'b': ends at byte" in text
    assert "a truncated shard, or a header that lies" in text


def test_truncated_data(tmp_path: Path) -> None:
    path = write_shard(tmp_path / "x", TWO)
    path.write_bytes(path.read_bytes()[:-1])
    assert "a truncated shard" in refusal(path)


@pytest.mark.parametrize("changes", [{"shape": [4]}, {"dtype": "BF16"}, {"shape": []}])
def test_size_is_not_that_of_the_shape(tmp_path: Path, changes: dict[str, Any]) -> None:
    assert "tensor 'b': takes 20 bytes, but" in refusal(lie(tmp_path / "x", "b", **changes))


def test_overlap(tmp_path: Path) -> None:
    table, _ = entries({**TWO, "c": ("U8", (4,))})
    table["b"]["data_offsets"] = [8, 28]
    table["c"]["data_offsets"] = [28, 32]
    assert "tensor 'b': overlaps 'a'" in refusal(write_table(tmp_path / "x", table, 32))


def test_empty_tensor_inside_another(tmp_path: Path) -> None:
    table, size = entries(TWO)
    table["c"] = {"dtype": "U8", "shape": [0], "data_offsets": [4, 4]}
    assert "overlaps" in refusal(write_table(tmp_path / "x", table, size))


def test_hole(tmp_path: Path) -> None:
    table, size = entries(TWO)
    table["b"]["data_offsets"] = [16, 36]
    text = refusal(write_table(tmp_path / "x", table, size + 4))
    assert "tensor 'b': leaves a hole of 4 bytes after a" in text


def test_bytes_that_belong_to_no_tensor(tmp_path: Path) -> None:
    table, size = entries(TWO)
    text = refusal(write_table(tmp_path / "x", table, size + 3))
    assert "3 bytes after the last tensor belong to none" in text


def test_long_names_are_cut(tmp_path: Path) -> None:
    header = json.dumps({"n" * 100_000: 5}).encode()
    assert "tensor 'nnnn" in refusal(write_raw(tmp_path / "x", header))


VALID = json.dumps(entries(TWO)[0]).encode()


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    edits=st.lists(
        st.tuples(st.integers(0, len(VALID) - 1), st.integers(32, 126)), min_size=1, max_size=3
    )
)
def test_damaged_headers_raise_or_describe_the_file(
    tmp_path: Path, edits: list[tuple[int, int]]
) -> None:
    """Flip characters of a valid header: either one clear error, or ranges that tile the data."""
    header = bytearray(VALID)
    for place, byte in edits:
        header[place] = byte
    path = write_raw(tmp_path / "x", bytes(header), bytes(32))
    try:
        shard, tensors = read_header(path)
    except ShardError:
        return
    end = shard.header_bytes
    for tensor in tensors.values():
        assert tensor.offset == end
        end += tensor.nbytes
    assert end == shard.size
