"""Model directories: how shards are found, and everything that can be wrong between files."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FP8_CONFIG, write_config, write_index, write_shard

from hmc.checkpoint import Checkpoint
from hmc.errors import ConfigError, HmcError, ShardError, TensorError, UnsupportedError, UsageError

A = {"a": ("BF16", (2, 3))}
B = {"b": ("F32", (5,)), "c": ("F16", (1,))}
ONE, TWO = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
MAP = {"a": ONE, "b": TWO, "c": TWO}


def write_two(directory: Path, weight_map: dict[str, Any] | None = None) -> None:
    """Two shards with an index, or with the index given."""
    write_config(directory, model_type="mixtral")
    write_shard(directory / ONE, A)
    write_shard(directory / TWO, B)
    write_index(directory, MAP if weight_map is None else weight_map)


def refusal(kind: type[HmcError], argument: Path | str) -> str:
    with pytest.raises(kind) as caught:
        Checkpoint.open(argument)
    assert type(caught.value) is kind
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_two_shards_with_index(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_shard(tmp_path / "consolidated.safetensors", A)  # Mistral ships a second copy
    checkpoint = Checkpoint.open(tmp_path)
    assert [shard.name for shard in checkpoint.shards] == [ONE, TWO]
    assert {name: tensor.shard for name, tensor in checkpoint.tensors.items()} == {
        "a": 0,
        "b": 1,
        "c": 1,
    }
    assert checkpoint.config.require_str("model_type") == "mixtral"
    assert not checkpoint.dummy


def test_single_shard_wins_over_a_stale_index(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_shard(tmp_path / "model.safetensors", A)
    assert [shard.name for shard in Checkpoint.open(tmp_path).shards] == ["model.safetensors"]


def test_shards_without_index(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    assert Checkpoint.open(tmp_path).tensors.keys() == {"a", "b", "c"}


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two(tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    assert Checkpoint.open(tmp_path.name).directory == Path(tmp_path.name)


def test_wrong_arguments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_two(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert "nowhere': no such directory" in refusal(UsageError, tmp_path / "nowhere")
    assert "pass the model directory" in refusal(UsageError, tmp_path / "config.json")
    assert "pass the model directory" in refusal(UsageError, tmp_path / ONE)
    for hub_id in ("deepseek-ai/DeepSeek-V3", "Qwen/Qwen3-30B-A3B-FP8@refs/pr/1"):
        text = refusal(UsageError, hub_id)
        assert f"{hub_id}: no such directory" in text
        assert f"`hmc compile {hub_id}` fetches it" in text
    assert "no such directory" in refusal(UsageError, "a\nb\0c")
    assert "cannot be looked up: File name too long" in refusal(UsageError, "x" * 5000)


def test_no_config(tmp_path: Path) -> None:
    assert "config.json: no such file" in refusal(ConfigError, tmp_path)


def test_no_shards(tmp_path: Path) -> None:
    write_config(tmp_path)
    assert "no .safetensors shard in it" in refusal(ShardError, tmp_path)
    (tmp_path / "pytorch_model.bin").touch()
    assert "pytorch_model.bin is of a format hmc does not read" in refusal(ShardError, tmp_path)


def test_missing_shard_of_an_index(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / TWO).unlink()
    text = refusal(ShardError, tmp_path)
    assert f"1 of 2 shards named by model.safetensors.index.json missing: {TWO}" in text


def test_missing_shard_without_index(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / "model.safetensors.index.json").unlink()
    (tmp_path / ONE).unlink()
    text = refusal(ShardError, tmp_path)
    assert f"1 of 2 shards implied by the others' names missing: {ONE}" in text


def test_broken_shard_is_named(tmp_path: Path) -> None:
    write_two(tmp_path)
    path = tmp_path / TWO
    path.write_bytes(path.read_bytes()[:-1])
    assert f"{path}: tensor 'c': ends at byte" in refusal(ShardError, tmp_path)


def test_index_and_shards_disagree(tmp_path: Path) -> None:
    write_two(tmp_path, {"a": TWO, "b": TWO, "d": ONE})
    text = refusal(TensorError, tmp_path)
    assert "model.safetensors.index.json: index and shards disagree: " in text
    assert f"1 listed but in no shard: d ({ONE})" in text
    assert f"1 listed for the wrong shard: a ({ONE}, not {TWO})" in text
    assert f"1 in a shard but not listed: c ({TWO})" in text


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        ({}, "weight_map is missing, empty or not an object"),
        ([ONE], "weight_map is missing, empty or not an object"),
        ({"a": 3}, "weight_map names shard 3, not a string"),
        ({"a": ["x"]}, "not a string"),
        ({"a": f"../{ONE}"}, "not a .safetensors file here"),
        ({"a": "/etc/passwd"}, "not a .safetensors file here"),
        ({"a": "model.bin"}, "not a .safetensors file here"),
        ({"a": "x\0.safetensors"}, "not a .safetensors file here"),
    ],
)
def test_malformed_index(tmp_path: Path, weight_map: Any, problem: str) -> None:
    write_two(tmp_path)
    write_index(tmp_path, weight_map)
    text = refusal(ConfigError, tmp_path)
    assert "model.safetensors.index.json: " in text
    assert problem in text


def test_index_that_is_no_json(tmp_path: Path) -> None:
    write_two(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("<html>")
    assert "index.json: not valid JSON" in refusal(ConfigError, tmp_path)


def test_tensor_in_two_shards(tmp_path: Path) -> None:
    write_two(tmp_path)
    write_shard(tmp_path / TWO, {**A, **B})
    text = refusal(TensorError, tmp_path)
    assert f"1 tensor stands in two shards: 'a' in {ONE} and {TWO}" in text


def test_unused_tensors(tmp_path: Path) -> None:
    write_two(tmp_path)
    checkpoint = Checkpoint.open(tmp_path)
    assert checkpoint.check_unused(["a", "b", "c"]) == ()
    assert checkpoint.check_unused(["a"], {"b": "spare", "[bc]*": "more", "x": "none"}) == (
        ("b", "1 left aside", "spare"),
        ("[bc]*", "1 left aside", "more"),
    )
    with pytest.raises(TensorError, match=r"1 tensor belongs to no part of the model: c$"):
        checkpoint.check_unused(["b"], {"a": ""})
    with pytest.raises(TensorError, match=r"3 tensors belong to no part of the model: a, b, c$"):
        checkpoint.check_unused([])


def test_config_alone(tmp_path: Path) -> None:
    path = write_config(tmp_path, dtype="float16")
    for argument in (tmp_path, path, str(path)):
        checkpoint = Checkpoint.from_config(argument)
        assert checkpoint.dummy
        assert checkpoint.directory == tmp_path
        assert checkpoint.shards == ()
        assert checkpoint.resolve("x.weight", (3, 5), linear=True).format == "fp16"
        checkpoint.check_unused(["anything"])
    with pytest.raises(UsageError, match="no such directory"):
        Checkpoint.from_config(tmp_path / "nowhere")
    write_config(tmp_path, torch_dtype="float8")
    with pytest.raises(UnsupportedError, match="torch_dtype is 'float8'; hmc reads bfloat16"):
        Checkpoint.from_config(tmp_path)


def test_import_is_cheap() -> None:
    code = "import sys, hmc.checkpoint; sys.exit(any(m in sys.modules for m in ('numpy', 'torch')))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.slow
def test_deepseek_v3_of_the_real_shapes(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "make_deepseek_v3.py"
    runpy.run_path(str(script))["write_deepseek_v3"](tmp_path)
    on_disk = sum(path.stat().st_blocks * 512 for path in tmp_path.iterdir())
    assert on_disk < 25_000_000
    checkpoint = Checkpoint.open(tmp_path)
    assert (len(checkpoint.shards), len(checkpoint.tensors)) == (135, 90_427)
    assert sum(shard.size for shard in checkpoint.shards) > 671_000_000_000
    assert checkpoint.config.section("quantization_config") is not None
    used: list[str] = []
    for layer in range(3, 61):
        for name, shape in (
            ("gate", (2048, 7168)),
            ("up", (2048, 7168)),
            ("down", (7168, 2048)),
        ):
            pattern = f"model.layers.{layer}.mlp.experts.{{e}}.{name}_proj.weight"
            sources = checkpoint.resolve_experts(pattern, 256, shape)
            assert {source.format for source in sources} == {"fp8"}
            used += [tensor for source in sources for tensor in source.tensor_names]
    assert len(used) == 58 * 256 * 6
    ragged = checkpoint.resolve(
        "model.layers.0.self_attn.kv_a_proj_with_mqa.weight", (576, 7168), linear=True
    )
    assert len(ragged.tensors) == 2
    assert ragged.tensors[1].shape == (5, 56)
    with pytest.raises(TensorError, match="1339 tensors belong to no part of the model: lm_head"):
        checkpoint.check_unused(used)
    rest = ["*.self_attn.*", "*norm*", "*.mlp.[!e]*", "lm_head.*", "*.embed_*"]
    checkpoint.check_unused(used, dict.fromkeys(rest, ""))
    assert FP8_CONFIG.items() >= dict(checkpoint.config.values["quantization_config"]).items()
