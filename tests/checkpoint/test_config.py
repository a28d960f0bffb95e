"""config.json getters: values, defaults, and errors that name the key."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import write_config

from hmc.checkpoint import ModelConfig, load_config, read_quantization
from hmc.errors import ConfigError

EXAMPLES = Path(__file__).parents[2] / "examples" / "configs"


def config_of(directory: Path, **values: Any) -> ModelConfig:
    write_config(directory, **values)
    return load_config(directory)


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
    storage = read_quantization(config).storage_of("model.layers.3.mlp.experts.7.up_proj")
    assert (storage.format if storage else "") == form
    text = config.path.read_text()
    assert json.dumps(json.loads(text), indent=2) + "\n" == text
    assert re.fullmatch("deepseek_v3|qwen3_moe|mixtral", config.require_str("model_type"))
