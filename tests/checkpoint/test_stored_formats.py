"""Weights of every format as checkpoints hold them, and what is wrong with some that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from checkpoint_files import FP8_CONFIG, int4_config, write_config, write_shard
from published import ATTENTION, EXPERT, MATRIX, NVFP4, PUBLISHED, STORED, compressed, floats, group

from hmc.checkpoint import Checkpoint
from hmc.checkpoint.views import View
from hmc.errors import TensorError
from hmc.formats import named

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]
W = f"{EXPERT}.weight"
CASES = [
    (name, module, form)
    for name, case in PUBLISHED.items()
    for module, form in case.formats.items()
    if form in STORED and not module.endswith("experts.gate_up_proj")
]


def opened(directory: Path, tensors: Tensors, section: Any = None) -> Checkpoint:
    write_config(directory, quantization_config=section)
    write_shard(directory / "model.safetensors", tensors)
    return Checkpoint.open(directory)


def of(module: str, form: str, **changes: Any) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Tensors of a module in a format; changes by the end of their names, None: left out."""
    ends = {**STORED[form], **{f".{end}": change for end, change in changes.items()}}
    return {module + end: tensor for end, tensor in ends.items() if tensor is not None}


def refusal(checkpoint: Checkpoint, name: str = W, linear: bool = True) -> str:
    with pytest.raises(TensorError) as caught:
        checkpoint.resolve(name, MATRIX, linear=linear)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(("name", "module", "form"), CASES)
def test_weights_of_published_checkpoints(
    tmp_path: Path, name: str, module: str, form: str
) -> None:
    tensors = of(module, form)
    checkpoint = opened(tmp_path, tensors, PUBLISHED[name].section)
    source = checkpoint.resolve(f"{module}.weight", MATRIX, linear=True)
    assert source.format == form
    assert checkpoint.check_unused(source.tensor_names) == ()
    assert sorted(source.tensor_names) == sorted(tensors)
    assert source.nbytes == sum(
        checkpoint.tensors[each].nbytes for each in tensors if not each.endswith("_shape")
    )
    dummy = Checkpoint.from_config(tmp_path).resolve(f"{module}.weight", MATRIX, linear=True)
    assert (dummy.format, dummy.group, dummy.note.split(" ")[0]) == (
        source.format, source.group, source.note.split(" ")[0])  # fmt: skip


def test_experts_of_gpt_oss(tmp_path: Path) -> None:
    """One stack of all experts, rows cut into blocks of 16 bytes."""
    stack = "model.layers.7.mlp.experts.gate_up_proj"
    tensors = {f"{stack}_blocks": ("U8", (4, 64, 3, 16)), f"{stack}_scales": ("U8", (4, 64, 3))}
    checkpoint = opened(tmp_path, tensors, PUBLISHED["gpt-oss-20b"].section)
    found = checkpoint.resolve_experts(stack, 4, (64, 96), View((4, 64, 96)))
    begin = checkpoint.tensors[f"{stack}_blocks"].offset
    assert [each.tensors[0].offset - begin for each in found] == [e * 64 * 48 for e in range(4)]
    assert {(each.format, each.tensors[0].shape) for each in found} == {("mxfp4", (64, 48))}


@pytest.mark.parametrize(
    ("form", "end", "shape"),
    [
        ("fp8-tensor", "weight_scale", (1,)),
        ("fp8-tensor", "weight_scale", (1, 1)),
        ("fp8-channel", "weight_scale", (256,)),
        ("nvfp4-times", "weight_scale_2", (1,)),
    ],
)
def test_scales_with_other_dimensions_of_one(
    tmp_path: Path, form: str, end: str, shape: tuple[int, ...]
) -> None:
    name = next(name for name, _, each in CASES if each == form)
    tensors = of(EXPERT, form, **{end: ("F32", shape)})
    checkpoint = opened(tmp_path, tensors, {**PUBLISHED[name].section, "exclude_modules": []})
    assert checkpoint.resolve(W, MATRIX, linear=True).format == form


@pytest.mark.parametrize(
    ("shape", "form"), [((), "fp8-tensor"), ((256, 1), "fp8-channel"), ((2, 4), "fp8")]
)
def test_scales_say_what_the_configuration_does_not(
    tmp_path: Path, shape: tuple[int, ...], form: str
) -> None:
    tensors = of(EXPERT, "fp8-tensor", weight_scale=("F32", shape))
    checkpoint = opened(tmp_path, tensors, {"quant_method": "fp8"})
    assert checkpoint.resolve(W, MATRIX, linear=True).format == form


@pytest.mark.parametrize("end", ["scale", "qscale_weight"])
def test_scales_that_publishers_name_otherwise(tmp_path: Path, end: str) -> None:
    """DeepSeek-V4 and Mistral Large 4."""
    tensors = of(EXPERT, "fp8", weight_scale_inv=None, **{end: ("F32", (2, 4))})
    checkpoint = opened(tmp_path, tensors, FP8_CONFIG)
    source = checkpoint.resolve(W, MATRIX, linear=True)
    assert source.format == "fp8" and sorted(source.tensor_names) == sorted(tensors)


def test_gate_and_down_in_different_formats(tmp_path: Path) -> None:
    """The tensors decide, within what the configuration speaks of."""
    down = EXPERT.replace("up_proj", "down_proj")
    section = compressed(
        "mixed-precision", ["lm_head"],
        group(NVFP4, targets=["re:.*experts.*"]), group(floats(8, "channel"), targets=["Linear"]),
    )  # fmt: skip
    checkpoint = opened(tmp_path, {**of(EXPERT, "nvfp4"), **of(down, "fp8-channel")}, section)
    found = [checkpoint.resolve(f"{each}.weight", MATRIX, linear=True) for each in (EXPERT, down)]
    assert [each.format for each in found] == ["nvfp4", "fp8-channel"]


def test_a_layer_that_is_not_quantised(tmp_path: Path) -> None:
    mtp = "model.layers.46.mlp.up_proj"
    checkpoint = opened(
        tmp_path, {**of(EXPERT, "int4"), f"{mtp}.weight": ("BF16", MATRIX)}, int4_config()
    )
    source = checkpoint.resolve(f"{mtp}.weight", MATRIX, linear=True)
    assert source.note == "BF16: stored unquantised, though no list says so"
    used = checkpoint.resolve(W, MATRIX, linear=True).tensor_names
    noted = checkpoint.check_unused(used, {"model.layers.46.*": "looks ahead"})
    assert noted == (("model.layers.46.*", "1 left aside", "looks ahead"),)


def test_what_is_beside_weights_is_left_aside_with_its_reason(tmp_path: Path) -> None:
    tensors = {
        **of(EXPERT, "nvfp4"),
        f"{EXPERT}.input_global_scale": ("F32", (1,)),
        f"{ATTENTION}.input_scale": ("F32", (1,)),
        "model.layers.7.self_attn.k_proj.k_scale": ("F32", (1,)),
    }
    checkpoint = opened(tmp_path, tensors, compressed("nvfp4-pack-quantized", [], group(NVFP4)))
    noted = checkpoint.check_unused(checkpoint.resolve(W, MATRIX, linear=True).tensor_names)
    assert [(note.choice, note.reason) for note in noted] == [
        ("2 left aside", "of quantised activations, which stay BF16"),
        ("1 left aside", "of a quantised cache, which stays BF16"),
    ]
    plain = opened(tmp_path, {f"{EXPERT}.input_scale": ("F32", (1,))})
    with pytest.raises(TensorError, match="belongs to no part of the model"):
        plain.check_unused([])


def test_groups_in_order_need_no_index(tmp_path: Path) -> None:
    tensors = of(EXPERT, "gptq", g_idx=("I32", (512,)))
    checkpoint = opened(tmp_path, tensors, PUBLISHED["GPTQ"].section)
    (note,) = checkpoint.check_unused(checkpoint.resolve(W, MATRIX, linear=True).tensor_names)
    assert note.subject.endswith(".g_idx") and "desc_act is false" in note.reason


NVFP4_SECTION = compressed("nvfp4-pack-quantized", ["re:.*gate$"], group(NVFP4))
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
WRONG: list[tuple[Any, Tensors, str]] = [
    (FP8_CONFIG, of(EXPERT, "fp8", weight_scale_inv=None), "weight_scale_inv is missing"),
    (FP8_CONFIG, of(EXPERT, "fp8", weight_scale_inv=("BF16", (4, 2))), "implies [2, 4]"),
    (FP8_CONFIG, of(EXPERT, "mxfp8"), "implies [2, 4]"),
    (FP8_CONFIG, of(EXPERT, "mxfp4-i8"), "config.json has no MXFP4"),
    (FP8_CONFIG, of(EXPERT, "int4"), "config.json has no INT4"),
    (None, of(EXPERT, "fp8-tensor"), "config.json has no FP8"),
    (None, of(EXPERT, "nvfp4"), "is packed, but config.json has no"),
    (None, of(EXPERT, "awq"), "is packed, but config.json has no"),
    (int4_config(), of(EXPERT, "fp8"), "config.json has no FP8"),
    (int4_config(), of(EXPERT, "int4", weight_scale=None), "weight_scale is missing"),
    (NVFP4_SECTION, of(EXPERT, "nvfp4", weight_global_scale=None), "_global_scale is missing"),
    (NVFP4_SECTION, of(EXPERT, "nvfp4", weight_scale=("U8", (256, 32))), "must be F8_E4M3"),
    (NVFP4_SECTION, of(EXPERT, "mxfp4"), "weight_scale is U8, must be F8_E4M3"),
    (NVFP4_SECTION, of(EXPERT, "nvfp4-times"), "is U8"),
    (MODELOPT, of(EXPERT, "nvfp4-times", weight_scale_2=None), "weight_scale_2 is missing"),
    (MODELOPT, of(EXPERT, "nvfp4-times", weight_scale_2=("F32", (2,))), "implies [1, 1]"),
    (MODELOPT, of(EXPERT, "nvfp4"), "is packed, but config.json has no"),
    (PUBLISHED["AWQ"].section, of(EXPERT, "awq", qzeros=None), "qzeros is missing"),
    (PUBLISHED["AWQ"].section, of(EXPERT, "gptq"), "implies [512, 32]"),
    (PUBLISHED["GPTQ with act-order"].section, of(EXPERT, "gptq-order", g_idx=None), "g_idx is"),
    (MODELOPT, {W: ("BF16", MATRIX), f"{W}_scale_2": ("F32", ())}, "_scale_2 holds scales for it"),
]  # fmt: skip


@pytest.mark.parametrize(("section", "tensors", "problem"), WRONG)
def test_contradictions(tmp_path: Path, section: Any, tensors: Tensors, problem: str) -> None:
    text = refusal(opened(tmp_path, tensors, section))
    assert f"{tmp_path / 'model.safetensors'}: tensor {EXPERT}." in text
    assert problem in text


@pytest.mark.parametrize("form", STORED)
def test_a_router_or_an_embedding_in_codes(tmp_path: Path, form: str) -> None:
    name, module, _ = next(case for case in CASES if case[2] == form) if form != "int4" else (
        "Kimi-K2.5", EXPERT, form)  # fmt: skip
    checkpoint = opened(tmp_path, of(module, form), PUBLISHED[name].section)
    assert "but hmc reads only linear weights" in refusal(checkpoint, f"{module}.weight", False)


def test_a_module_kept_out_that_is_in_codes(tmp_path: Path) -> None:
    gate = "model.layers.7.mlp.gate"
    checkpoint = opened(tmp_path, of(gate, "nvfp4"), NVFP4_SECTION)
    assert "is packed, but ignore in config.json lists it" in refusal(checkpoint, f"{gate}.weight")


def test_scales_that_no_format_knows(tmp_path: Path) -> None:
    for extra in (f"{W}_scale_2", f"{EXPERT}.weight_zero_point", named(W, ".scale")):
        checkpoint = opened(tmp_path, {**of(EXPERT, "fp8"), extra: ("F32", (1,))}, FP8_CONFIG)
        used = checkpoint.resolve(W, MATRIX, linear=True).tensor_names
        with pytest.raises(TensorError, match=f"beside a weight.*: {extra}$"):
            checkpoint.check_unused(used)
