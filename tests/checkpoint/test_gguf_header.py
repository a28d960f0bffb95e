"""Headers of GGUF files: what gguf wrote is read, what is wrong is one line that names it."""

from __future__ import annotations

import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hmc.checkpoint import Checkpoint, read_fingerprint
from hmc.checkpoint.gguf import open_gguf
from hmc.checkpoint.gguf.files import read_files
from hmc.checkpoint.gguf.header import read_gguf
from hmc.errors import ConfigError, HmcError, ShardError, TensorError, UnsupportedError, UsageError

U32, I32, F32, BOOL, STRING, ARRAY, U64 = 4, 5, 6, 7, 8, 9, 10


def text(value: str | bytes) -> bytes:
    data = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(data)) + data


def key(name: str, kind: int, data: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + data


def tensor(name: str, dims: Sequence[int], kind: int = 0, offset: int = 0) -> bytes:
    sizes = struct.pack(f"<{len(dims)}Q", *dims)
    return text(name) + struct.pack("<I", len(dims)) + sizes + struct.pack("<IQ", kind, offset)


def raw(
    path: Path,
    keys: Sequence[bytes] = (),
    tensors: Sequence[bytes] = (),
    data: int = 0,
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    counts: tuple[int, int] | None = None,
) -> Path:
    """A file of exactly these parts, with `data` bytes behind its header."""
    tensor_count, key_count = counts or (len(tensors), len(keys))
    header = magic + struct.pack("<IQQ", version, tensor_count, key_count)
    header += b"".join(keys) + b"".join(tensors)
    path.write_bytes(header + bytes(-len(header) % 32 + data if data else 0))
    return path


def written(path: Path) -> Path:
    """A file of gguf's own writer: values and tensors of all kinds."""
    writer = gguf.GGUFWriter(path, "qwen3moe")
    for value in (7, 2**32 - 1):
        writer.add_uint32(f"a.u{value}", value)
    writer.add_int32("a.i", -5)
    writer.add_float32("a.f", 1e-5)
    writer.add_float64("a.d", 0.1)
    writer.add_bool("a.yes", True)
    writer.add_uint64("a.q", 2**63)
    writer.add_string("a.s", "Grüße")
    writer.add_array("a.texts", ["a", "", "日本"])
    writer.add_array("a.numbers", [1, -2, 3])
    writer.add_array("a.floats", [0.5, 1.5])
    writer.add_tensor("f32", np.arange(15, dtype=np.float32).reshape(3, 5))
    writer.add_tensor("f16", np.arange(7, dtype=np.float16))
    for kind in ("Q4_0", "Q8_0", "BF16"):
        number = gguf.GGMLQuantizationType[kind]
        data = gguf.quantize(np.arange(2 * 3 * 64, dtype=np.float32).reshape(2, 3, 64), number)
        writer.add_tensor(kind, data, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_what_gguf_wrote(tmp_path) -> None:
    path = written(tmp_path / "a.gguf")
    found, theirs = read_gguf(path, 3), gguf.GGUFReader(path)
    assert found.metadata["a.texts"] == ["a", "", "日本"]
    assert list(found.metadata["a.numbers"]) == [1, -2, 3]
    assert list(found.metadata["a.floats"]) == [0.5, 1.5]
    values = {name: found.metadata[f"a.{name}"] for name in ("u7", "i", "d", "yes", "q", "s")}
    assert values == {"u7": 7, "i": -5, "d": 0.1, "yes": True, "q": 2**63, "s": "Grüße"}
    assert found.metadata["a.f"] == 1e-5  # and not the 32-bit float that is nearest to it
    expected = {each.name: each for each in theirs.tensors}
    assert [each.name for each in found.tensors] == [each.name for each in theirs.tensors]
    content = path.read_bytes()
    for each in found.tensors:
        other = expected[each.name]
        assert (each.offset, each.nbytes, each.shard) == (other.data_offset, other.n_bytes, 3)
        assert content[each.offset :][: each.nbytes] == other.data.tobytes()
    shapes = {each.name: (each.dtype, each.shape) for each in found.tensors}
    assert shapes == {
        "f32": ("F32", (3, 5)), "f16": ("F16", (7,)), "BF16": ("BF16", (2, 3, 64)),
        "Q4_0": ("Q4_0", (2, 3, 36)), "Q8_0": ("Q8_0", (2, 3, 68)),
    }  # fmt: skip
    assert read_fingerprint(path, found.shard.header_bytes) == found.shard
    assert found.shard.header_bytes <= min(each.offset for each in found.tensors)


GOOD = tensor("a", (4, 2))


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ({"magic": b"GGML"}, "not a GGUF file"),
        ({"magic": b"version https://git-lfs.github.com/spec/v1"}, "a Git LFS pointer"),
        ({"version": 1}, "GGUF of version 1; hmc reads versions 2 and 3"),
        ({"version": 3 << 24}, "big-endian; hmc reads"),
        ({"counts": (2**60, 0)}, "1152921504606846976 tensors, more than the file could hold"),
        ({"counts": (0, 2**63)}, "metadata keys, more than the file could hold"),
        ({"keys": [text(b"\xff")], "counts": (0, 1)}, "more than the file"),
        ({"keys": [key("k", U32, b"abcd")] * 2}, "metadata key 'k' stands there twice"),
        ({"keys": [key("k", 77, bytes(8))]}, "metadata 'k' has the unknown type 77"),
        ({"keys": [key("k", STRING, struct.pack("<Q", 2**62))]}, "'k': ends at byte"),
        ({"keys": [key("k", STRING, text(b"\xff\xfe"))]}, "'k': not UTF-8"),
        ({"keys": [key("k", ARRAY, struct.pack("<IQ", U32, 2**61))]}, "'k': ends at byte over"),
        ({"keys": [key("k", ARRAY, struct.pack("<IQ", STRING, 2**61))]}, "strings, more than"),
        ({"keys": [key("k", ARRAY, struct.pack("<IQ", ARRAY, 1) + bytes(12))]}, "unknown type 9"),
        ({"keys": [key("general.alignment", U32, struct.pack("<I", 24))]}, "must be a power of"),
        ({"keys": [key("general.alignment", STRING, text("32"))]}, "must be a power of two"),
        ({"tensors": [tensor("a", (4, 2), 5)]}, "tensor 'a': has the unknown type 5"),
        ({"tensors": [tensor("a", ())]}, "tensor 'a': 0 dimensions, must be 1 to 4"),
        ({"tensors": [tensor("a", (1,) * 5)]}, "tensor 'a': 5 dimensions"),
        ({"tensors": [tensor("a", (2**40, 2**40))]}, "tensor 'a': dimensions"),
        ({"tensors": [tensor("a", (48, 2), 2)]}, "rows of 48 are no whole blocks of 32, as Q4_0"),
        ({"tensors": [tensor("a", (4, 2), 0, 4)], "data": 99}, "multiple of the alignment of 32"),
        ({"tensors": [tensor("a", (4, 2))], "data": 31}, "tensor 'a': ends at byte"),
        ({"tensors": [tensor("a", (4,), 0, 2**63 + 32)], "data": 99}, "ends at byte over 2**63"),
        ({"tensors": [GOOD, tensor("b", (4,))], "data": 99}, "'a': overlaps 'b'"),
        ({"tensors": [tensor("a", (4, 0))], "data": 99}, "tensor 'a': dimensions [4, 0]: nothing"),
        ({"tensors": [GOOD, tensor("a", (4,), 0, 32)], "data": 99}, "'a' stands there twice"),
        ({"tensors": [tensor("", (4,))], "data": 99}, "a tensor needs a printable name"),
        ({"tensors": [tensor("a\nb", (4,))], "data": 99}, "a tensor needs a printable name"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_one_line(tmp_path, parts, said) -> None:
    path = raw(tmp_path / "a.gguf", **parts)
    with pytest.raises((ShardError, UnsupportedError)) as caught:
        read_gguf(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and said in message and "\n" not in message


def test_overlapping_tensors_of_one_length(tmp_path) -> None:
    tensors = [GOOD, tensor("b", (16,), 0, 32), tensor("c", (4,), 0, 64)]
    with pytest.raises(ShardError, match="'c': overlaps 'b'"):
        read_gguf(raw(tmp_path / "a.gguf", (), tensors, 200))


def test_every_truncation_is_one_line(tmp_path) -> None:
    whole = written(tmp_path / "a.gguf").read_bytes()
    path = tmp_path / "cut.gguf"
    for length in (*range(0, 600, 7), len(whole) - 1 - len(whole) % 32):
        path.write_bytes(whole[:length])
        with pytest.raises((ShardError, UnsupportedError), match=r"^[^\n]*cut\.gguf: [^\n]*$"):
            read_gguf(path)


@settings(
    max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.data())
def test_any_changed_bytes_are_read_or_refused(tmp_path, data) -> None:
    good = tmp_path / "good.gguf"
    content = bytearray((good if good.exists() else written(good)).read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 700))
        size = data.draw(st.sampled_from((1, 4, 8)))
        content[at : at + size] = data.draw(st.binary(min_size=size, max_size=size))
    path = tmp_path / "changed.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    said, tensors = "", ()
    try:
        tensors = read_gguf(path).tensors
    except HmcError as error:
        said = str(error)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "\n" not in said
    assert all(each.offset + each.nbytes <= len(content) for each in tensors)
    assert peak < 40 * len(content) + (4 << 20)


def test_files_that_are_none(tmp_path) -> None:
    for path, said in ((tmp_path / "none.gguf", "no such file"), (tmp_path, "not a regular file")):
        with pytest.raises(ShardError, match=said):
            read_gguf(path)
    empty = tmp_path / "a.gguf"
    empty.write_bytes(b"")
    with pytest.raises(ShardError, match="the file is empty"):
        read_gguf(empty)
    with pytest.raises(UsageError, match=r"or a \.gguf file"):
        Checkpoint.open(raw(tmp_path / "weights", magic=b"GGUF"))
    (tmp_path / "model").mkdir()
    (tmp_path / "model/config.json").write_text("{}")
    raw(tmp_path / "model/b.gguf")
    with pytest.raises(ShardError, match=r"pass the GGUF file itself: .*model/b\.gguf"):
        Checkpoint.open(tmp_path / "model")


def number(name: str, value: int) -> bytes:
    return key(name, U32, struct.pack("<I", value))


def part(path: Path, place: int, count: int, name: str = "", tensors: int = 0) -> Path:
    keys = [number("split.no", place), number("split.count", count)]
    keys += [number("split.tensors.count", tensors)] if tensors else []
    return raw(path, keys, [tensor(name, (4,))] if name else [], 32)


def test_parts_of_a_file(tmp_path) -> None:
    names = [tmp_path / f"m-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
    first, second, third = names
    part(first, 0, 3, tensors=2)
    with pytest.raises(ShardError, match=r"2 of 3 parts are missing: m-00002-of-00003\.gguf, m-"):
        read_files(first)
    part(second, 1, 3, "a")
    part(third, 2, 3, "b")
    found = read_files(first)
    assert [each.shard.name for each in found] == [each.name for each in names]
    assert [(t.name, t.shard) for each in found for t in each.tensors] == [("a", 1), ("b", 2)]
    with pytest.raises(ShardError, match="part 2 of 3: pass the first part"):
        read_files(second)
    part(third, 1, 3, "b")
    with pytest.raises(ShardError, match="says it is part 2 of 3, not 3 of 3"):
        read_files(first)
    part(third, 2, 2, "b")
    with pytest.raises(ShardError, match=r"split\.no is 2, split\.count 2: no such part"):
        read_files(first)
    part(third, 2, 3, "a")
    with pytest.raises(TensorError, match=r"'a' stands in m-00002-of-00003\.gguf too"):
        read_files(first)
    part(third, 2, 3)
    with pytest.raises(TensorError, match="its parts have 1 tensors, not 2"):
        read_files(first)
    part(first, 0, 60_000)
    with pytest.raises(ShardError, match="no such part"):
        read_files(first)
    part(tmp_path / "m.gguf", 0, 3)
    with pytest.raises(ShardError, match=r"must end in -00001-of-00003\.gguf"):
        read_files(tmp_path / "m.gguf")


def model(path: Path, tensors: Sequence[bytes], *, name: str = "qwen3moe", **keys: Any) -> Path:
    """A file of an architecture with one layer, and what else is given."""
    values = {"block_count": 1, "embedding_length": 32, "context_length": 64, "expert_count": 2,
              "attention.head_count": 2, "attention.head_count_kv": 1, "expert_used_count": 1,
              "expert_feed_forward_length": 32, **keys}  # fmt: skip
    made = [key("general.architecture", STRING, text(name))]
    made += [number(f"{name}.{each}", value) for each, value in values.items() if value is not None]
    made.append(key(f"{name}.attention.layer_norm_rms_epsilon", F32, struct.pack("<f", 1e-6)))
    return raw(path, made, tensors, 1 << 14)


TABLE = tensor("token_embd.weight", (32, 8))


@pytest.mark.parametrize(
    ("tensors", "keys", "error", "said"),
    [
        ([GOOD], {}, ConfigError, r"no token_embd\.weight of two dimensions"),
        ([TABLE, tensor("b", (256, 2), 21, 1024), tensor("c", (32,), 9, 2048)], {},
         UnsupportedError, r"2 tensors of type IQ3_S, Q8_1 \(b and 1 more\); of GGUF's types hmc"),
        ([TABLE], {"block_count": None}, ConfigError, r"qwen3moe\.block_count is missing"),
        ([TABLE], {"block_count": 0}, ConfigError, r"block_count is 0: no layers"),
        ([TABLE], {"block_count": 2**31}, ConfigError, "2147483648 layers, but 1 tensors"),
        ([TABLE], {"rope.dimension_count": 8}, UnsupportedError, "dimension_count is 8; hmc reads"),
        ([TABLE, tensor("blk.0.ffn_up_exps.weight", (4,), 0, 1024)], {}, TensorError,
         r"has shape \[4\], 2 experts are stacked"),
        ([TABLE, tensor("blk.0.ffn_up_exps.weight", (4, 2, 3), 0, 1024)], {}, TensorError,
         r"has shape \[3, 2, 4\], 2 experts are stacked"),
        ([TABLE, tensor("blk.0.ffn_gate_up_exps.weight", (4, 3, 2), 0, 1024)], {}, TensorError,
         "3 rows are no 2 parts"),
        ([TABLE, tensor("blk.0.ffn_up_exps.weight", (4, 2, 2), 0, 1024),
          tensor("blk.0.ffn_up.1.weight", (4, 2), 0, 2048)], {}, TensorError,
         r"another is model\.layers\.0\.mlp\.experts\.1\.up_proj"),
    ],
)  # fmt: skip
def test_models_that_are_none(tmp_path, tensors, keys, error, said) -> None:
    with pytest.raises(error, match=said) as caught:
        open_gguf(model(tmp_path / "a.gguf", tensors, **keys))
    assert "\n" not in str(caught.value)


def test_experts_and_joined_projections_are_tensors_of_their_own(tmp_path) -> None:
    both = tensor("blk.0.ffn_gate_up_exps.weight", (4, 6, 2), 0, 1024)
    found = open_gguf(model(tmp_path / "a.gguf", [TABLE, both, tensor("else", (4,), 0, 2048)]))
    start = found.tensors["model.embed_tokens.weight"].offset + 1024
    places = {
        name.removeprefix("model.layers.0.mlp.experts."): (each.offset - start, each.shape)
        for name, each in found.tensors.items()
        if "experts" in name
    }
    assert places == {
        "0.gate_proj.weight": (0, (3, 4)), "0.up_proj.weight": (48, (3, 4)),
        "1.gate_proj.weight": (96, (3, 4)), "1.up_proj.weight": (144, (3, 4)),
    }  # fmt: skip
    assert "else" in found.tensors  # which `check_unused` will name
    assert found.config.values["vocab_size"] == 8 and found.location == tmp_path / "a.gguf"


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 800), st.binary(min_size=1, max_size=8))
def test_any_changed_model_is_opened_or_refused(tmp_path, at, new) -> None:
    stack = tensor("blk.0.ffn_up_exps.weight", (4, 2, 2), 0, 1024)
    content = bytearray(model(tmp_path / "a.gguf", [TABLE, stack]).read_bytes())
    content[at : at + len(new)] = new
    (tmp_path / "a.gguf").write_bytes(content)
    said = ""
    try:
        open_gguf(tmp_path / "a.gguf")
    except HmcError as error:
        said = str(error)
    assert "\n" not in said


def test_keys_and_values_of_other_heads(tmp_path) -> None:
    ours = [
        tensor("token_embd.weight", (32, 8)),
        tensor("blk.0.attn_k_b.weight", (4, 6, 2), 0, 1024),
    ]
    values = {"attention.kv_lora_rank": 6, "attention.key_length": 6, "attention.value_length": 4,
              "rope.dimension_count": 2, "feed_forward_length": 32}  # fmt: skip
    for dims, said in (((6, 5, 3), "are not of one matrix"), ((6, 5), "it is one matrix a head")):
        tensors = [*ours, tensor("blk.0.attn_v_b.weight", dims, 0, 2048)]
        with pytest.raises(TensorError, match=said):
            open_gguf(model(tmp_path / "a.gguf", tensors, name="deepseek2", **values))
    whole = [*ours, tensor("blk.0.attn_v_b.weight", (6, 5, 2), 0, 2048)]
    found = open_gguf(model(tmp_path / "a.gguf", whole, name="deepseek2", **values))
    joined = found.resolve("model.layers.0.self_attn.kv_b_proj.weight", (18, 6), linear=True)
    assert [(part.rows, part.transposed) for part in joined.parts] == [(4, True), (5, False)]
    assert joined.beside == ("blk.0.attn_k_b.weight", "blk.0.attn_v_b.weight")


def test_architectures_that_are_not_read(tmp_path) -> None:
    path = raw(tmp_path / "a.gguf", [key("general.architecture", STRING, text("bert"))])
    with pytest.raises(
        UnsupportedError, match="is 'bert'; of GGUF files hmc reads afmoe, bailingmoe2"
    ):
        open_gguf(path)
    with pytest.raises(ConfigError, match=r"general\.architecture is missing"):
        open_gguf(raw(path))
