"""Finding weights: formats, scales, and contradictions between data, scales and configuration."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FP8_CONFIG, int4_config, write_config, write_shard
from format_rows import E5M2_ROWS

from hmc.checkpoint import Checkpoint
from hmc.errors import TensorError
from hmc.formats import registered

W = "model.layers.0.mlp.up_proj.weight"
SHAPE = (200, 300)  # ragged blocks both ways
FP8 = {W: ("F8_E4M3", SHAPE), f"{W}_scale_inv": ("F32", (2, 3))}
INT4 = {
    f"{W}_packed": ("I32", (200, 40)),
    f"{W}_scale": ("BF16", (200, 10)),
    f"{W}_shape": ("I64", (2,)),
}
Tensors = Mapping[str, tuple[str, tuple[int, ...]]]


def opened(directory: Path, tensors: Tensors, quantization: Any = None) -> Checkpoint:
    write_config(directory, quantization_config=quantization)
    write_shard(directory / "model.safetensors", tensors)
    return Checkpoint.open(directory)


def refusal(
    checkpoint: Checkpoint, shape: tuple[int, ...] = SHAPE, name: str = W, linear: bool = True
) -> str:
    with pytest.raises(TensorError) as caught:
        checkpoint.resolve(name, shape, linear=linear)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("dtype", "name"), [("BF16", "bf16"), ("F16", "fp16"), ("F32", "f32")])
def test_plain(tmp_path: Path, dtype: str, name: str) -> None:
    checkpoint = opened(tmp_path, {W: (dtype, SHAPE)})
    source = checkpoint.resolve(W, SHAPE, linear=True)
    assert source.format == name
    assert source.tensors == (checkpoint.tensors[W],)
    assert (source.dtypes, source.group) == ((dtype,), 0)
    assert source.note == f"{dtype}: the checkpoint is not quantised"
    assert source.tensor_names == (W,)
    assert source.nbytes == checkpoint.tensors[W].nbytes


@pytest.mark.parametrize("scales", ["F32", "BF16"])
def test_fp8(tmp_path: Path, scales: str) -> None:
    tensors = {**FP8, f"{W}_scale_inv": (scales, (2, 3))}
    checkpoint = opened(tmp_path, tensors, FP8_CONFIG)
    source = checkpoint.resolve(W, SHAPE, linear=True)
    assert (source.format, source.group) == ("fp8", 0)
    assert source.dtypes == ("F8_E4M3", scales)
    assert source.tensors == (checkpoint.tensors[W], checkpoint.tensors[f"{W}_scale_inv"])
    assert source.note == f"FP8 E4M3, 128x128 scales in {scales}"
    assert source.nbytes == 60_000 + 6 * (4 if scales == "F32" else 2)
    checkpoint.check_unused(source.tensor_names)


@pytest.mark.parametrize("scales", ["F32", "BF16", "F16"])
def test_int4(tmp_path: Path, scales: str) -> None:
    shape = (200, 320)
    checkpoint = opened(tmp_path, {**INT4, f"{W}_scale": (scales, (200, 10))}, int4_config())
    source = checkpoint.resolve(W, shape, linear=True)
    assert (source.name, source.shape, source.format, source.group) == (W, shape, "int4", 32)
    assert source.tensors == tuple(checkpoint.tensors[f"{W}{end}"] for end in ("_packed", "_scale"))
    assert source.note == f"INT4 symmetric, one {scales} scale per 32 columns"
    checkpoint.check_unused(source.tensor_names)


@pytest.mark.parametrize(
    ("linear", "listed", "note"),
    [
        (False, [], "BF16: not the weight of a linear layer"),
        (True, ["mlp.up_proj"], "BF16: listed in modules_to_not_convert"),
        (True, [], "BF16: stored unquantised, though no list says so"),
    ],
)
def test_reason_for_an_unquantised_weight(
    tmp_path: Path, linear: bool, listed: list[str], note: str
) -> None:
    config = {**FP8_CONFIG, "modules_to_not_convert": listed}
    checkpoint = opened(tmp_path, {W: ("BF16", SHAPE)}, config)
    assert checkpoint.resolve(W, SHAPE, linear=linear).note == note


def test_head_without_a_list(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {"lm_head.weight": ("BF16", SHAPE)}, FP8_CONFIG)
    source = checkpoint.resolve("lm_head.weight", SHAPE, linear=True)
    assert source.note == "BF16: listed in the default of modules_to_not_convert"


def test_missing(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {W: ("BF16", SHAPE)})
    assert refusal(checkpoint, name="x.weight") == f"{tmp_path}: tensor x.weight is missing"


def test_wrong_shape(tmp_path: Path) -> None:
    text = refusal(opened(tmp_path, {W: ("BF16", SHAPE)}), (300, 200))
    assert f"{tmp_path / 'model.safetensors'}: tensor {W} has shape [200, 300]" in text
    assert "config.json implies [300, 200]" in text


@pytest.mark.parametrize(
    ("stored", "asked"),
    [((6, 1, 4), (6, 4)), ((6,), (1, 6)), ((1, 1, 6, 1), (6,)), ((6, 4), (6, 1, 4))],
)
def test_dimensions_of_1_say_nothing(
    tmp_path: Path, stored: tuple[int, ...], asked: tuple[int, ...]
) -> None:
    checkpoint = opened(tmp_path, {W: ("BF16", stored)})
    source = checkpoint.resolve(W, asked, linear=False)
    assert (source.shape, source.nbytes) == (asked, 2 * prod(stored))
    text = refusal(checkpoint, (*asked[:-1], asked[-1] + 1))
    assert f"has shape {list(stored)}" in text


@pytest.mark.parametrize("dtype", ["F8_E5M2", "I32"])
def test_wrong_dtype(tmp_path: Path, dtype: str) -> None:
    text = refusal(opened(tmp_path, {W: (dtype, SHAPE)}, FP8_CONFIG))
    assert f"{W} is {dtype}; hmc reads BF16, F16, F32" in text


@pytest.mark.parametrize(
    ("tensors", "config", "problem"),
    [
        (FP8, None, "is F8_E4M3, but config.json has no FP8 quantization_config"),
        (FP8, int4_config(), "is F8_E4M3, but config.json has no FP8 quantization_config"),
        (
            FP8,
            {**FP8_CONFIG, "modules_to_not_convert": ["up_proj"]},
            "is F8_E4M3, but modules_to_not_convert in config.json lists it",
        ),
        ({W: FP8[W]}, FP8_CONFIG, f"is F8_E4M3, but {W}_scale_inv is missing"),
        ({**FP8, W: ("BF16", SHAPE)}, FP8_CONFIG, f"is BF16, yet {W}_scale_inv holds scales"),
        ({W: ("BF16", SHAPE), f"{W}_scale": ("F32", (1,))}, None, f"yet {W}_scale holds scales"),
        ({**FP8, f"{W}_scale_inv": ("F32", (3, 2))}, FP8_CONFIG, "config.json implies [2, 3]"),
        ({**FP8, f"{W}_scale_inv": ("F32", (1,))}, FP8_CONFIG, "has shape [1]"),
        ({**FP8, f"{W}_scale_inv": ("I32", (2, 3))}, FP8_CONFIG, "is I32, must be F32 or BF16"),
    ],
)
def test_fp8_contradictions(tmp_path: Path, tensors: Tensors, config: Any, problem: str) -> None:
    text = refusal(opened(tmp_path, tensors, config))
    assert f"{tmp_path / 'model.safetensors'}: tensor {W}" in text
    assert problem in text


def test_fp8_where_no_linear_weight_is(tmp_path: Path) -> None:
    text = refusal(opened(tmp_path, FP8, FP8_CONFIG), linear=False)
    assert "hmc reads only linear weights in FP8" in text


def without(name: str) -> Tensors:
    return {key: value for key, value in INT4.items() if key != name}


@pytest.mark.parametrize(
    ("tensors", "config", "problem"),
    [
        (INT4, None, "is packed, but config.json has no INT4 quantization_config"),
        (INT4, FP8_CONFIG, "is packed, but config.json has no INT4 quantization_config"),
        (
            INT4,
            {**int4_config(), "ignore": ["re:.*up_proj"]},
            "is packed, but ignore in config.json lists it",
        ),
        ({**INT4, W: ("BF16", (200, 320))}, int4_config(), f"stands beside {W}"),
        (without(f"{W}_scale"), int4_config(), f"is packed, but {W}_scale is missing"),
        (without(f"{W}_shape"), int4_config(), f"is packed, but {W}_shape is missing"),
        ({**INT4, f"{W}_packed": ("F32", (200, 40))}, int4_config(), "is F32, must be I32"),
        ({**INT4, f"{W}_packed": ("I32", (200, 80))}, int4_config(), "implies [200, 40]"),
        ({**INT4, f"{W}_scale": ("BF16", (200, 1))}, int4_config(), "implies [200, 10]"),
        ({**INT4, f"{W}_scale": ("I32", (200, 10))}, int4_config(), "is I32, must be BF16 or"),
        ({**INT4, f"{W}_shape": ("F32", (2,))}, int4_config(), "is F32, must be I64 or I32"),
        ({**INT4, f"{W}_shape": ("I64", (3,))}, int4_config(), "implies [2]"),
        (INT4, int4_config(group_size=128), "no multiple of group_size 128"),
    ],
)
def test_int4_contradictions(tmp_path: Path, tensors: Tensors, config: Any, problem: str) -> None:
    text = refusal(opened(tmp_path, tensors, config), (200, 320))
    assert f"{tmp_path / 'model.safetensors'}: tensor {W}_" in text
    assert problem in text


def test_int4_where_no_linear_weight_is(tmp_path: Path) -> None:
    text = refusal(opened(tmp_path, INT4, int4_config()), (200, 320), linear=False)
    assert "hmc reads only linear weights in INT4" in text


def test_fp8_of_compressed_tensors(tmp_path: Path) -> None:
    weights = {"num_bits": 8, "type": "float", "strategy": "block", "block_structure": [128, 128]}
    config = {**int4_config(**weights), "format": "float-quantized"}
    tensors: Tensors = {W: ("F8_E4M3", SHAPE), f"{W}_scale": ("BF16", (2, 3))}
    source = opened(tmp_path, tensors, config).resolve(W, SHAPE, linear=True)
    assert (source.format, source.dtypes) == ("fp8", ("F8_E4M3", "BF16"))
    assert source.tensor_names == (W, f"{W}_scale")


def test_many_missing_weights_are_one_error(tmp_path: Path) -> None:
    checkpoint = opened(tmp_path, {W: ("BF16", SHAPE)})
    checkpoint.require_present([W])
    with pytest.raises(TensorError, match=r"7 tensors are missing: m0, m1, m2, m3 and 3 more$"):
        checkpoint.require_present([W, *(f"m{number}" for number in range(7))])
    with pytest.raises(TensorError, match=r"2 tensors are missing: e0.w, e1.w$"):
        checkpoint.resolve_experts("e{e}.w", 2, SHAPE)
    with pytest.raises(TensorError, match=r"1 tensor is missing: x$"):
        checkpoint.require_present([W, "x"])


def test_experts(tmp_path: Path) -> None:
    names = [f"experts.{number}.up_proj.weight" for number in range(11)]
    checkpoint = opened(tmp_path, dict.fromkeys(names, ("BF16", SHAPE)))
    sources = checkpoint.resolve_experts("experts.{e}.up_proj.weight", 11, SHAPE)
    assert [source.tensors for source in sources] == [(checkpoint.tensors[name],) for name in names]
    assert sources == [checkpoint.resolve(name, SHAPE, linear=True) for name in names]


@pytest.mark.parametrize("config", [None, FP8_CONFIG, int4_config()])
def test_invented_weights_are_what_a_checkpoint_would_hold(tmp_path: Path, config: Any) -> None:
    """Same format, dtypes, shapes and sizes as a stored checkpoint of that configuration."""
    shape = (200, 320)
    stored: dict[str, Tensors] = {
        "none": {W: ("BF16", shape)},
        "fp8": {W: ("F8_E4M3", shape), f"{W}_scale_inv": ("F32", (2, 3))},
        "compressed-tensors": INT4,
    }
    real = opened(tmp_path, stored[config["quant_method"] if config else "none"], config)
    dummy = Checkpoint.from_config(tmp_path)
    expected = real.resolve(W, shape, linear=True)
    invented = dummy.resolve(W, shape, linear=True)
    assert {tensor.shard for tensor in invented.tensors} == {-1}
    for field in ("name", "shape", "format", "dtypes", "group", "note", "nbytes", "tensor_names"):
        assert getattr(invented, field) == getattr(expected, field)
    for mine, theirs in zip(invented.tensors, expected.tensors, strict=True):
        assert (mine.name, mine.dtype, mine.shape) == (theirs.name, theirs.dtype, theirs.shape)
    assert dummy.resolve("lm_head.weight", shape, linear=True).format == "bf16"
    assert dummy.resolve("norm.weight", (320,), linear=False).format == "bf16"
    assert len(dummy.resolve_experts("e.{e}.weight", 3, shape)) == 3


def test_invented_int4_needs_whole_groups(tmp_path: Path) -> None:
    path = write_config(tmp_path, quantization_config=int4_config())
    with pytest.raises(TensorError, match="has 300 input columns, no multiple of group_size 32"):
        Checkpoint.from_config(path).resolve(W, SHAPE, linear=True)


def test_a_format_of_ones_own_is_found(tmp_path: Path) -> None:
    with registered(E5M2_ROWS):
        config = {"quant_method": "fp8", "fmt": "e5m2", "modules_to_not_convert": ["lm_head"]}
        write_config(tmp_path, quantization_config=config)
        invented = Checkpoint.from_config(tmp_path).resolve(W, (200, 300), linear=True)
        write_shard(
            tmp_path / "model.safetensors",
            {W: ("F8_E5M2", (200, 300)), f"{W}_scale_inv": ("BF16", (200, 1))},
        )
        source = Checkpoint.open(tmp_path).resolve(W, (200, 300), linear=True)
        assert (source.format, source.note) == ("e5m2_rows", "FP8 E5M2, one BF16 scale a row")
        assert source.tensor_names == invented.tensor_names == (W, f"{W}_scale_inv")
        assert invented.dtypes == ("F8_E5M2", "F32")
