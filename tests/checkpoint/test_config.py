"""config.json getters and quantization_config: values, defaults, and errors that name the key."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FP8_CONFIG, int4_config, write_config
from transformers.quantizers.quantizers_utils import should_convert_module

from hmc.checkpoint import ModelConfig, Quantization, load_config, read_quantization
from hmc.errors import ConfigError, UnsupportedError
from hmc.formats import Storage

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


def config_of(directory: Path, **values: Any) -> ModelConfig:
    write_config(directory, **values)
    return load_config(directory)


def quantization_of(directory: Path, quantization: Any) -> Quantization:
    return read_quantization(config_of(directory, quantization_config=quantization))


def test_getters(tmp_path: Path) -> None:
    config = config_of(
        tmp_path,
        hidden_size=64,
        rope_theta=10000,
        eps=1e-6,
        tie=True,
        model_type="mixtral",
        eos_token_id=2,
        eos_list=[1, 2],
        names=["a", "b"],
        nothing=None,
        rope={"factor": 40, "deep": {"x": 1}},
    )
    assert config.require_int("hidden_size") == 64
    assert config.require_float("rope_theta") == 10000.0
    assert type(config.require_float("rope_theta")) is float
    assert config.get_float("eps", 1.0) == 1e-6
    assert config.get_bool("tie", False) is True
    assert config.require_str("model_type") == "mixtral"
    assert config.get_ints("eos_token_id") == (2,)
    assert config.get_ints("eos_list") == (1, 2)
    assert config.get_strs("names") == ("a", "b")
    assert "nothing" not in config
    assert "tie" in config
    assert config.get_int("nothing", -7) == -7
    assert config.get_float("absent", 0.5) == 0.5
    assert config.get_bool("absent", True) is True
    assert config.get_str("absent", "x") == "x"
    assert config.get_ints("absent") == ()
    assert config.get_strs("absent") == ()
    assert config.section("absent") is None
    rope = config.section("rope")
    assert rope is not None
    assert rope.require_int("factor") == 40
    deep = rope.section("deep")
    assert deep is not None
    with pytest.raises(ConfigError, match=r"config\.json: rope\.deep\.y is missing"):
        deep.require_int("y")


@pytest.mark.parametrize(
    ("value", "call", "problem"),
    [
        (None, lambda c: c.require_int("k"), "k is null"),
        ("3", lambda c: c.require_int("k"), "k is '3', must be a whole number"),
        (3.0, lambda c: c.require_int("k"), "must be a whole number"),
        (True, lambda c: c.require_int("k"), "must be a whole number"),
        (-1, lambda c: c.require_int("k"), "must be at least 0"),
        (0, lambda c: c.require_int("k", minimum=1), "must be at least 1"),
        (True, lambda c: c.require_float("k"), "must be a finite number"),
        (float("inf"), lambda c: c.require_float("k"), "must be a finite number"),
        (float("nan"), lambda c: c.get_float("k", 0.0), "must be a finite number"),
        (10**400, lambda c: c.require_float("k"), "must be a finite number"),
        (1, lambda c: c.get_bool("k", False), "must be true or false"),
        (["silu"], lambda c: c.require_str("k"), "must be a string"),
        ([1, "2"], lambda c: c.get_ints("k"), "must be a whole number or a list of them"),
        ("ab", lambda c: c.get_strs("k"), "must be a list of strings"),
        ([], lambda c: c.section("k"), "must be an object"),
    ],
)
def test_wrong_values(
    tmp_path: Path, value: Any, call: Callable[[ModelConfig], object], problem: str
) -> None:
    config = config_of(tmp_path, k=value)
    with pytest.raises(ConfigError) as caught:
        call(config)
    assert str(tmp_path / "config.json") in str(caught.value)
    assert problem in str(caught.value)


@pytest.mark.parametrize(
    "call",
    [
        lambda c: c.require_int("k"),
        lambda c: c.require_float("k"),
        lambda c: c.require_str("k"),
    ],
)
def test_missing_key(tmp_path: Path, call: Callable[[ModelConfig], object]) -> None:
    config = config_of(tmp_path)
    with pytest.raises(ConfigError, match="k is missing"):
        call(config)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "not valid JSON"),
        ("{'a': 1}", "not valid JSON: .* at line 1 column 2"),
        ('{"a": 1,\n "b"}', "at line 2 column 5"),
        ("[1]", "holds a JSON array, not an object"),
        ('"x"', "holds a JSON string, not an object"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
    ],
)
def test_broken_file(tmp_path: Path, text: str, problem: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match=problem):
        load_config(tmp_path)


def test_file_absent_or_unreadable(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config\.json: no such file"):
        load_config(tmp_path)
    (tmp_path / "config.json").mkdir()
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


def test_digest_is_of_the_bytes(tmp_path: Path) -> None:
    before = config_of(tmp_path, a=1).sha256
    assert config_of(tmp_path, a=1).sha256 == before
    assert config_of(tmp_path, a=2).sha256 != before


def test_no_quantization(tmp_path: Path) -> None:
    quantization = read_quantization(config_of(tmp_path))
    assert quantization == Quantization()
    assert not quantization.skips("lm_head")
    assert quantization_of(tmp_path, None) == Quantization()


def test_fp8(tmp_path: Path) -> None:
    quantization = quantization_of(tmp_path, FP8_CONFIG)
    assert quantization.storage == Storage("fp8", ("", "_scale_inv"))
    assert quantization.skips("lm_head")
    assert not quantization.skips("model.layers.0.mlp.gate_proj")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [64, 128]),
        ("weight_block_size", [128]),
        ("weight_block_size", 128),
        ("weight_block_size", None),
        ("fmt", "e5m2"),
        ("activation_scheme", "static"),
        ("expert_dtype", "fp4"),
        ("modules_to_convert", ["embed_tokens"]),
        ("quant_method", "gptq"),
        ("quant_method", None),
    ],
)
def test_fp8_without_kernels(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_of(tmp_path, {**FP8_CONFIG, key: value})
    assert f"config.json: quantization_config.{key} is" in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", "128x128"),
        ("modules_to_not_convert", "lm_head"),
        ("modules_to_not_convert", ["a("]),
        ("modules_to_not_convert", ["a)(?:b"]),
        ("fmt", 3),
    ],
)
def test_malformed_fp8(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(ConfigError, match=rf"quantization_config\.{key}"):
        quantization_of(tmp_path, {**FP8_CONFIG, key: value})


def test_quantization_config_that_is_no_object(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="quantization_config is 'fp8', must be an object"):
        quantization_of(tmp_path, "fp8")


MODULES = [
    "lm_head",
    "model.layers.1",
    "model.layers.1.mlp.gate",
    "model.layers.1.mlp.gate_proj",
    "model.layers.1.mlp.experts.11.gate_proj",
    "model.layers.11.mlp.gate",
    "model.layers.1.self_attn.q_proj",
    "model.norm",
    "xlm_head",
]


@pytest.mark.parametrize(
    "patterns",
    [
        [],
        ["lm_head"],
        ["model.layers.1"],
        ["model.layers.1."],
        ["gate"],
        ["mlp.gate"],
        ["model.layers.*mlp.gate"],
        ["re:lm_head"],
        ["model.layers.1|lm_head"],
        ["self_attn", "experts.1"],
        [r".*\.experts\.\d+"],
        [""],
        ["model", "norm"],
    ],
)
def test_skip_list_means_what_it_means_to_transformers(tmp_path: Path, patterns: list[str]) -> None:
    quantization = quantization_of(tmp_path, {**FP8_CONFIG, "modules_to_not_convert": patterns})
    for module in MODULES:
        assert quantization.skips(module) is not should_convert_module(module, patterns), module


def test_ignored_layers_is_another_name(tmp_path: Path) -> None:
    quantization = quantization_of(tmp_path, {**FP8_CONFIG, "ignored_layers": ["mlp.gate"]})
    assert quantization.skip_key == "ignored_layers"
    assert quantization.skips("model.layers.3.mlp.mlp.gate")
    assert not quantization.skips("lm_head")


@pytest.mark.parametrize("size", [32, 128])
def test_int4(tmp_path: Path, size: int) -> None:
    quantization = quantization_of(tmp_path, int4_config(group_size=size))
    beside = (("_shape", ("I64", "I32"), (2,)),)
    assert quantization.storage == Storage("int4", ("_packed", "_scale"), size, beside)
    assert quantization.skips("lm_head")
    assert quantization.skips("model.layers.3.mlp.gate")
    assert not quantization.skips("model.layers.3.mlp.gate_proj")
    assert not quantization.skips("model.lm_head")


@pytest.mark.parametrize("order", [None, False, "static", "weight"])
def test_int4_orders_that_leave_columns_in_place(tmp_path: Path, order: Any) -> None:
    storage = quantization_of(tmp_path, int4_config(actorder=order)).storage
    assert storage is not None and storage.format == "int4"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_bits", 8),
        ("num_bits", 3),
        ("type", "float"),
        ("symmetric", False),
        ("strategy", "channel"),
        ("group_size", 64),
        ("group_size", -1),
        ("group_size", None),
        ("actorder", "group"),
        ("actorder", True),
    ],
)
def test_int4_without_kernels(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_of(tmp_path, int4_config(**{key: value}))
    assert f"quantization_config.config_groups.group_0.weights.{key} is" in str(caught.value)


def fp8_blocks(**weights: Any) -> dict[str, Any]:
    return {
        **int4_config(
            num_bits=8, type="float", strategy="block", block_structure=[128, 128], **weights
        ),
        "format": "float-quantized",
    }


def test_fp8_of_compressed_tensors(tmp_path: Path) -> None:
    quantization = quantization_of(tmp_path, fp8_blocks())
    assert quantization.storage == Storage("fp8", ("", "_scale"))


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `config` with the value at a dotted path replaced."""
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    place = config
    for key in parents:
        place = place[key]
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        (changed(int4_config(), "format", "marlin-24"), "format is 'marlin-24'"),
        (changed(int4_config(), "kv_cache_scheme", {"num_bits": 8}), "kv_cache_scheme is"),
        (changed(int4_config(), "ignore", ["Linear"]), "ignore is"),
        (changed(int4_config(), "config_groups.group_1", {}), r"2 groups \(group_0, group_1\)"),
        (changed(int4_config(), "config_groups.group_0.targets", ["re:.*"]), "targets is"),
        (changed(int4_config(), "sparsity_config", {"format": "sparse-24"}), "format is 'sparse"),
        (changed(fp8_blocks(), "format", "pack-quantized"), "format is 'pack-quantized'"),
        (
            changed(fp8_blocks(), "config_groups.group_0.weights.strategy", "tensor"),
            "strategy is 'tensor'",
        ),
        (
            changed(fp8_blocks(), "config_groups.group_0.weights.block_structure", [64, 64]),
            r"block_structure is \[64, 64\]",
        ),
    ],
)
def test_compressed_tensors_without_kernels(
    tmp_path: Path, config: dict[str, Any], problem: str
) -> None:
    with pytest.raises(UnsupportedError, match=problem):
        quantization_of(tmp_path, config)


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("config_groups", None, "config_groups is missing"),
        ("config_groups.group_0.weights", None, "config_groups has no weights"),
        ("config_groups.group_0", None, "config_groups has no weights"),
        ("format", None, "format is null"),
        ("ignore", ["re:("], "ignore: '[(]' is no regex"),
        ("ignore", "lm_head", "must be a list of strings"),
    ],
)
def test_malformed_compressed_tensors(tmp_path: Path, path: str, value: Any, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        quantization_of(tmp_path, changed(int4_config(), path, value))


def test_nested_and_older_places_of_compressed_tensors(tmp_path: Path) -> None:
    plain = quantization_of(tmp_path, int4_config())
    nested = {
        "quant_method": "compressed-tensors",
        "quantization_config": int4_config(),
        "sparsity_config": {"format": "dense"},
    }
    assert quantization_of(tmp_path, nested) == plain
    inner = int4_config()
    del inner["quant_method"]
    assert read_quantization(config_of(tmp_path, compression_config=inner)) == plain
    group_format = changed(int4_config(), "config_groups.group_0.format", "pack-quantized")
    assert quantization_of(tmp_path, changed(group_format, "format", None)) == plain


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("deepseek-v3", "fp8"),
        ("qwen3-30b-a3b", ""),
        ("qwen3-30b-a3b-fp8", "fp8"),
        ("qwen3-30b-a3b-int4", "int4"),
        ("mixtral-8x7b", ""),
    ],
)
def test_example_configs(name: str, form: str) -> None:
    config = load_config(EXAMPLES / name)
    storage = read_quantization(config).storage
    assert (storage.format if storage else "") == form
    text = config.path.read_text()
    assert json.dumps(json.loads(text), indent=2) + "\n" == text
    assert re.fullmatch("deepseek_v3|qwen3_moe|mixtral", config.require_str("model_type"))
