"""Stacks of experts as quantised checkpoints publish them: MXFP4 of gpt-oss, and its GGUF file,
which gives the same tokens; FP8 of Step-3.7. Logits against transformers on the weights that the
codes mean.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from parity import errors, tiny_plan
from played import executor
from safetensors.torch import load_file, save_file
from split_plans import split_plan
from tiny_models import oracle, prompt
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import hmc

pytest.importorskip("compressed_tensors")  # of the extra "test"
from stored_weights import STORED

Stored = tuple[dict[str, torch.Tensor], torch.Tensor]
"""Planes by what follows the name of a stack, and the stack in F32 that they mean."""

SECTION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
FP8 = STORED["fp8"]


def _mxfp4(stack: torch.Tensor) -> Stored:
    """[experts, rows, groups, 16] of two codes a byte, the first in the low half, and exponents, of
    a stack by columns; what transformers makes of them.
    """
    planes = [STORED["mxfp4"].pack(one.T.contiguous()) for one in stack]
    codes = torch.stack([each[".weight_packed"] for each in planes])
    scales = torch.stack([each[".weight_scale"].view(torch.uint8) for each in planes])
    blocks = codes.reshape(*scales.shape, 16)
    means = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    return {"_blocks": blocks, "_scales": scales}, means


def _fp8(stack: torch.Tensor) -> Stored:
    planes = [FP8.pack(one) for one in stack]
    codes, scales = (
        torch.stack([each[end] for each in planes]) for end in (".weight", ".weight_scale_inv")
    )
    return {"": codes, "_scale_inv": scales}, torch.stack([FP8.unpack(each) for each in planes])


def _publish(
    directory: Path,
    plain: Path,
    ends: tuple[str, ...],
    stored: Callable[[torch.Tensor], Stored],
    **keys: Mapping[str, Any] | float,
) -> None:
    """A checkpoint whose stacks, called by `ends`, are `stored`, with `keys` in its configuration,
    and beside it in "twin" what it means, in F32.
    """
    config = json.loads((plain / "config.json").read_text()) | keys
    tensors, twin = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        tensors[name], twin[name] = tensor, tensor.float()
        if name.endswith(ends):
            del tensors[name]
            planes, twin[name] = stored(tensor.float())
            tensors |= {name + end: plane for end, plane in planes.items()}
    plainly = {key: value for key, value in config.items() if key != "quantization_config"}
    for folder, held, said in ((directory, tensors, config), (directory / "twin", twin, plainly)):
        folder.mkdir(exist_ok=True)
        held = {name: tensor.contiguous() for name, tensor in held.items()}
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(said))


@pytest.fixture(scope="module")
def gpt_oss(tiny: Callable[..., Path], written: Callable[..., Path]) -> Path:
    def write(directory: Path) -> None:
        ends = ("experts.gate_up_proj", "experts.down_proj")
        # GGUF files do not say another limit.
        keys: dict[str, Any] = {"swiglu_limit": 7.0, "quantization_config": SECTION}
        _publish(directory, tiny("gpt_oss"), ends, _mxfp4, **keys)

    return written("gpt-oss-mxfp4", write)


def _formats(plan: hmc.Plan) -> set[str]:
    """Those of matrices of experts."""
    return {each.format for each in plan.experts if not each.role.endswith("_bias")}


def _assert_as_close_as_bf16(directory: Path, form: str) -> None:
    plan = tiny_plan(directory)
    assert _formats(plan) == {form}
    exact = oracle(directory / "twin", torch.float32)
    bound = errors(oracle(directory / "twin", torch.bfloat16), exact)
    with hmc.Engine(plan, threads=2) as engine:
        for logits in (engine.logits, engine.decode_logits):
            found = errors(logits(prompt()), exact)
            assert np.median(found) <= 1.5 * np.median(bound)
            assert (found > 0.05).mean() <= (bound > 0.05).mean() + 0.2


def test_mxfp4_of_gpt_oss(gpt_oss: Path) -> None:
    _assert_as_close_as_bf16(gpt_oss, "mxfp4")


@pytest.mark.slow
def test_fp8_of_step(tiny: Callable[..., Path], tmp_path: Path) -> None:
    names = tuple(f".moe.{name}_proj.weight" for name in ("gate", "up", "down"))
    _publish(tmp_path, tiny("step3p7"), names, _fp8, quantization_config=FP8.section)
    _assert_as_close_as_bf16(tmp_path, "fp8")


@pytest.mark.slow
def test_mxfp4_of_gpt_oss_on_devices(gpt_oss: Path) -> None:
    with hmc.Engine(tiny_plan(gpt_oss), threads=2) as engine:
        expected = engine.logits(prompt())
    plan = split_plan(gpt_oss, max_context=64, max_chunk=32, switches=True)
    with executor(plan, gpt_oss) as found:
        for phase in [each.name for each in plan.phases if each.name.startswith("prefill")]:
            sequence = found.open()
            *_, last = found.prefill(sequence, np.array(prompt(), np.int32), phase=phase)
            assert errors(last[-1:], expected[-1:]) < 0.03, phase
            found.release(sequence)


@pytest.mark.slow
def test_a_gguf_file_of_gpt_oss_and_its_twin_give_the_same_tokens(
    gpt_oss: Path, tmp_path: Path
) -> None:
    """Its blocks have the published codes in another order."""
    path = write_gguf(tmp_path / "a.gguf", gpt_oss / "twin", "BF16", kinds={"experts": "MXFP4"})
    answers = []
    for location, form in ((path, "ggml_mxfp4"), (gpt_oss, "mxfp4")):
        plan = tiny_plan(location)
        assert _formats(plan) == {form}
        with hmc.Engine(plan, threads=2) as engine:
            tokens = engine.generate(prompt(20), max_new_tokens=8).token_ids
            answers.append((list(tokens), engine.logits(prompt(20))))
    (tokens, logits), (expected, exact) = answers
    assert tokens == expected
    assert np.abs(logits - exact).max() < 1e-3 * np.abs(exact).max()
