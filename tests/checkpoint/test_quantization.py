"""What configurations say of modules: published ones, every dialect's rules, and refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FP8_CONFIG, int4_config, write_config
from published import (
    ATTENTION,
    EXPERT,
    HEAD,
    PUBLISHED,
    ROUTER,
    Published,
    compressed,
    group,
    whole,
)
from transformers.quantizers.quantizers_utils import should_convert_module

from hmc.checkpoint import Quantization, load_config, read_quantization
from hmc.errors import ConfigError, UnsupportedError
from hmc.formats import Storage


def config_of(directory: Path, **values: Any) -> Quantization:
    write_config(directory, **values)
    return read_quantization(load_config(directory))


def quantization_of(directory: Path, quantization: Any) -> Quantization:
    return config_of(directory, quantization_config=quantization)


def form_of(quantization: Quantization, module: str) -> str:
    storage = quantization.storage_of(module)
    return storage.format if storage else ""


@pytest.mark.parametrize("case", PUBLISHED.values(), ids=PUBLISHED)
def test_published(tmp_path: Path, case: Published) -> None:
    quantization = quantization_of(tmp_path, case.section)
    assert {module: form_of(quantization, module) for module in case.formats} == case.formats


def test_no_quantization(tmp_path: Path) -> None:
    quantization = config_of(tmp_path)
    assert quantization == Quantization() == quantization_of(tmp_path, None)
    assert not quantization.skips("lm_head")
    assert quantization.storage_of("lm_head") is None


def test_fp8(tmp_path: Path) -> None:
    quantization = quantization_of(tmp_path, FP8_CONFIG)
    assert quantization.storages == (Storage("fp8", ("", "_scale_inv")),)
    assert quantization.skips("lm_head")
    assert quantization.storage_of("lm_head") is None
    assert quantization.storage_of("model.layers.0.mlp.gate_proj") == quantization.storages[0]
    note = ("activations", "BF16")
    assert [each[:2] for each in quantization.notes] == [note]
    static = quantization_of(tmp_path, {**FP8_CONFIG, "activation_scheme": "static"})
    assert static.storages == quantization.storages
    assert "activation_scheme is static" in static.notes[0].reason


def test_fp8_without_a_block_size(tmp_path: Path) -> None:
    """One scale a tensor is meant; scales of rows or of blocks of 128 x 128 may be there."""
    section = {"quant_method": "fp8"}
    found = [each.format for each in quantization_of(tmp_path, section).storages]
    assert found == ["fp8-tensor", "fp8-channel", "fp8"]


def test_expert_dtype_beside_the_section(tmp_path: Path) -> None:
    quantization = config_of(tmp_path, quantization_config=FP8_CONFIG, expert_dtype="fp4")
    assert form_of(quantization, EXPERT) == "mxfp4-i8"
    assert form_of(quantization, ATTENTION) == "fp8"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight_block_size", [48, 128]),
        ("weight_block_size", [128]),
        ("weight_block_size", 128),
        ("fmt", "e5m2"),
        ("expert_dtype", "fp2"),
        ("modules_to_convert", ["embed_tokens"]),
    ],
)
def test_fp8_that_no_format_reads(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_of(tmp_path, {**FP8_CONFIG, key: value})
    text = str(caught.value)
    assert "config.json: quantization_config: no weight format that hmc reads has" in text
    assert f"{key} {value!r}" in text


@pytest.mark.parametrize("method", ["bitsandbytes", None])
def test_methods_that_no_format_reads(tmp_path: Path, method: str | None) -> None:
    known = "hmc reads awq, compressed-tensors, fbgemm_fp8, fp8, gptq, modelopt, mxfp4"
    with pytest.raises(UnsupportedError, match=rf"quantization_config.quant_method is .*{known}"):
        quantization_of(tmp_path, {**FP8_CONFIG, "quant_method": method})


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


SHAPE = (("_shape", ("I64", "I32"), (2,)),)


@pytest.mark.parametrize("size", [32, 64, 128])
def test_int4(tmp_path: Path, size: int) -> None:
    quantization = quantization_of(tmp_path, int4_config(group_size=size))
    assert quantization.storages == (Storage("int4", ("_packed", "_scale"), size, SHAPE),)
    assert quantization.skips("lm_head")
    assert quantization.skips("language_model.lm_head")
    assert quantization.skips("model.layers.3.mlp.gate")
    assert not quantization.skips("model.layers.3.mlp.gate_proj")
    assert not quantization.skips("model.xlm_head")


@pytest.mark.parametrize("group_size", [-1, None])
def test_int4_by_channel(tmp_path: Path, group_size: int | None) -> None:
    section = int4_config(strategy="channel", group_size=group_size)
    assert quantization_of(tmp_path, section).storages[0].group == -1


@pytest.mark.parametrize("order", [None, False, "static", "weight"])
def test_int4_orders_that_leave_columns_in_place(tmp_path: Path, order: Any) -> None:
    assert form_of(quantization_of(tmp_path, int4_config(actorder=order)), EXPERT) == "int4"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_bits", 3),
        ("type", "float"),
        ("strategy", "tensor"),
        ("group_size", 48),
        ("group_size", None),
        ("actorder", "group"),
        ("actorder", True),
    ],
)
def test_packed_that_no_format_reads(tmp_path: Path, key: str, value: Any) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_of(tmp_path, int4_config(**{key: value}))
    text = str(caught.value)
    assert "quantization_config.config_groups.group_0.weights: no weight format" in text
    assert value is None or f"{key} {value!r}" in text
    assert "format 'pack-quantized'" in text and "\n" not in text


def changed(config: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of `config` with the value at a dotted path replaced."""
    config = copy.deepcopy(config)
    *parents, last = path.split(".")
    place = config
    for key in parents:
        place = place.setdefault(key, {})
    place[last] = value
    return config


@pytest.mark.parametrize(
    ("path", "value", "problem"),
    [
        ("format", "marlin-24", "format 'marlin-24'"),
        ("config_groups.group_0.weights.symmetric", "no", "must be true or false"),
        ("sparsity_config", {"format": "sparse-24"}, "format is 'sparse"),
        ("transform_config.config_groups", {"R1": {}}, "R1 transforms at None"),
        (
            "transform_config.config_groups",
            {"R3": {"apply": [{"location": "weight_input"}, {"location": "q_attn"}]}},
            "R3 transforms at q_attn",
        ),
        ("config_groups", None, "config_groups is missing"),
        ("config_groups.group_0", None, "group_0 is null"),
        ("config_groups.group_0.targets", [], "targets are missing"),
        ("config_groups.group_0.targets", ["re:("], "targets: '[(]' is no regex"),
        ("ignore", ["re:("], "ignore: '[(]' is no regex"),
        ("ignore", "lm_head", "must be a list of strings"),
    ],
)
def test_compressed_tensors_refused(tmp_path: Path, path: str, value: Any, problem: str) -> None:
    with pytest.raises((ConfigError, UnsupportedError), match=problem):
        quantization_of(tmp_path, changed(int4_config(), path, value))


def test_what_is_not_about_weights_is_noted(tmp_path: Path) -> None:
    section = changed(int4_config(), "kv_cache_scheme", {"num_bits": 8})
    section = changed(section, "config_groups.group_0.input_activations", {"num_bits": 8})
    activations, cache = quantization_of(tmp_path, section).notes
    assert activations.subject == "activations" and "group_0.input_activations" in activations[2]
    assert cache[:2] == ("cache", "BF16") and "kv_cache_scheme is ignored" in cache.reason
    alone = changed(section, "config_groups.group_0.weights", None)
    assert quantization_of(tmp_path, alone).storages == ()


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
    assert config_of(tmp_path, compression_config=inner) == plain
    assert config_of(tmp_path, text_config={"quantization_config": int4_config()}) == plain
    group_format = changed(int4_config(), "config_groups.group_0.format", "pack-quantized")
    for other in (None, "mixed-precision", "dense"):
        assert quantization_of(tmp_path, changed(group_format, "format", other)) == plain
    assert quantization_of(tmp_path, changed(int4_config(), "format", None)) == plain


def test_which_target_counts(tmp_path: Path) -> None:
    """As compressed-tensors has it (`match_targets`): names, then expressions by alphabet, then
    classes; a target of two groups is of the later one."""
    groups = [
        group(whole(4, 32), targets=["Linear"]),
        group(whole(4, 64), targets=["re:.*mlp.*", "re:.*self_attn.*"]),
        group(whole(4, 128), targets=["re:.*experts.*", ATTENTION, "re:.*self_attn.k.*"]),
        group(whole(8, 128), targets=["experts.5.up_proj"]),
        group(whole(8, 64), targets=["re:.*experts.*"]),
    ]
    found = quantization_of(tmp_path, compressed("pack-quantized", ["mlp.gate"], *groups))

    def numbers(module: str) -> tuple[str, int] | None:
        storage = found.storage_of(module)
        return storage and (storage.format, storage.group)

    assert numbers(ATTENTION) == ("int4", 128)
    assert numbers("model.layers.7.self_attn.k_proj") == ("int4", 64)
    assert numbers(EXPERT) == ("int8-packed", 64)
    assert numbers("model.layers.0.mlp.up_proj") == ("int4", 64)
    assert numbers("other.experts.5.up_proj") == ("int8-packed", 64)
    assert numbers("other.proj") == ("int4", 32)
    assert numbers(ROUTER) is None and found.skips(ROUTER)


def test_model_optimizer_beside_config_json(tmp_path: Path) -> None:
    layers = {ATTENTION: {"quant_algo": "FP8"}, EXPERT: {"quant_algo": "NVFP4", "group_size": 16}}
    whole_file = {"producer": {"name": "modelopt"}, "quantization": {
        "quant_algo": "MIXED_PRECISION", "kv_cache_quant_algo": "FP8",
        "quantized_layers": layers}}  # fmt: skip
    beside = tmp_path / "hf_quant_config.json"
    beside.write_text(json.dumps(whole_file))
    for said in (None, {"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}):
        found = quantization_of(tmp_path, said)
        assert (form_of(found, ATTENTION), form_of(found, EXPERT)) == ("fp8-tensor", "nvfp4-times")
        assert form_of(found, HEAD) == ""
    beside.write_text(json.dumps({"quantization": {"quant_algo": "NVFP4", "exclude_modules": []}}))
    assert form_of(quantization_of(tmp_path, None), HEAD) == "nvfp4-times"
    beside.write_text(json.dumps({"quantization": {"kv_cache_quant_algo": "FP8"}}))
    assert quantization_of(tmp_path, None).storages == ()
    for text, problem in (
        ('{"quantization": {"quant_algo": "W4A8_AWQ"}}', "format 'W4A8_AWQ'"),
        ('{"quantization": {"quant_algo": "MIXED_PRECISION"}}', "quantized_layers is missing"),
        ("{}", "hf_quant_config.json: quantization is missing"),
        ("{", "hf_quant_config.json: not valid JSON"),
    ):
        beside.write_text(text)
        with pytest.raises((ConfigError, UnsupportedError), match=problem):
            quantization_of(tmp_path, None)


@pytest.mark.parametrize(
    ("method", "values"),
    [
        ("awq", {"version": "gemv"}),
        ("awq", {"bits": 3}),
        ("awq", {"group_size": 100}),
        ("gptq", {"bits": 2}),
        ("gptq", {"checkpoint_format": "marlin"}),
        ("gptq", {"desc_act": True, "bits": 3, "checkpoint_format": "gptq_v2"}),
    ],
)
def test_awq_and_gptq_that_no_format_reads(
    tmp_path: Path, method: str, values: dict[str, Any]
) -> None:
    with pytest.raises(UnsupportedError) as caught:
        quantization_of(tmp_path, {"quant_method": method, **values})
    assert all(f"{key} {value!r}" in str(caught.value) for key, value in values.items())
