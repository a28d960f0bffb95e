"""gpt-oss as it is published, experts in MXFP4: its logits against transformers on what that makes
of the blocks, and its GGUF file, which gives the same tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf_files import write_gguf
from parity import errors, tiny_plan
from safetensors.torch import load_file, save_file
from tiny_models import oracle, prompt
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

import hmc

pytest.importorskip("compressed_tensors")  # of the extra "test"
from stored_weights import STORED

SECTION = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}


def _blocks(stack: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """[experts, rows, groups, 16] of two codes a byte, the first in the low half, and exponents, of
    a stack by columns."""
    planes = [STORED["mxfp4"].pack(one.T.float().contiguous()) for one in stack]
    codes = torch.stack([each[".weight_packed"] for each in planes])
    scales = torch.stack([each[".weight_scale"].view(torch.uint8) for each in planes])
    return codes.reshape(*scales.shape, 16), scales


def _publish(directory: Path, plain: Path) -> None:
    """The published layout of a checkpoint, and beside it in "twin" what it means, in F32."""
    config = json.loads((plain / "config.json").read_text())
    config["swiglu_limit"] = 7.0  # which GGUF files do not say
    tensors, twin = {}, {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            blocks, scales = _blocks(tensor)
            tensors |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
            twin[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
        else:
            tensors[name], twin[name] = tensor, tensor.float()
    for folder, held, more in (
        (directory, tensors, {"quantization_config": SECTION}),
        (directory / "twin", twin, {"torch_dtype": "float32"}),
    ):
        folder.mkdir(exist_ok=True)
        held = {name: tensor.contiguous() for name, tensor in held.items()}
        save_file(held, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | more))


@pytest.fixture(scope="module")
def published(tiny: Callable[..., Path], written: Callable[..., Path]) -> Path:
    return written("gpt-oss-mxfp4", lambda directory: _publish(directory, tiny("gpt_oss")))


def test_published_layout_against_transformers(published: Path) -> None:
    plan = tiny_plan(published)
    formats = {each.role: each.format for each in plan.experts}
    assert {formats[role] for role in ("gate", "up", "down")} == {"mxfp4"}
    assert {formats[role] for role in formats if role.endswith("bias")} == {"bf16"}
    exact = oracle(published / "twin", torch.float32)
    bound = errors(oracle(published / "twin", torch.bfloat16), exact)
    with hmc.Engine(plan, threads=2) as engine:
        for logits in (engine.logits, engine.decode_logits):
            found = errors(logits(prompt()), exact)
            assert np.median(found) <= 1.5 * np.median(bound)
            assert (found > 0.05).mean() <= (bound > 0.05).mean() + 0.2


@pytest.mark.slow
def test_gguf_file_gives_the_tokens_of_its_twin(published: Path, tmp_path: Path) -> None:
    """Blocks have the published codes in another order."""
    path = write_gguf(tmp_path / "a.gguf", published / "twin", "BF16", kinds={"experts": "MXFP4"})
    plan = tiny_plan(path)
    experts = {each.format for each in plan.experts if not each.role.endswith("bias")}
    assert experts == {"ggml_mxfp4"}
    answers = []
    for each in (plan, tiny_plan(published)):
        with hmc.Engine(each, threads=2) as engine:
            tokens = engine.generate(prompt(20), max_new_tokens=8).token_ids
            answers.append((list(tokens), engine.logits(prompt(20))))
    (tokens, logits), (expected, exact) = answers
    assert tokens == expected
    assert np.abs(logits - exact).max() < 1e-3 * np.abs(exact).max()
