"""MiniMax-M3 as its MXFP8 checkpoint stores it: projections of the indexer too, no router and no
vision tower. Logits against transformers on the weights that the codes mean.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from parity import errors, tiny_plan
from tiny_models import oracle, prompt

import hmc

pytest.importorskip("compressed_tensors")  # of the extra "test"
from stored_weights import STORED, Storing, store

MXFP8 = STORED["mxfp8 of MiniMax"]
SECTION = {
    "quant_method": "mxfp8",
    "activation_scheme": "dynamic",
    "weight_block_size": [1, 32],
    "ignored_layers": ["lm_head", "model.embed_tokens", "vision_tower", "gate"],
}


def _way(module: str) -> Storing | None:
    return MXFP8 if module.startswith("language_model.model.layers.") else None


@pytest.mark.slow
def test_mxfp8(tiny: Callable[..., Path], tmp_path: Path) -> None:
    directory = store(tmp_path, tiny("minimax_m3_vl"), _way, SECTION)
    plan = tiny_plan(directory)
    found = {each.name: each.format for each in plan.weights}
    quantised = {name for name, form in found.items() if form == "mxfp8"}
    layer = "language_model.model.layers.1"
    for name in ("q_proj", "o_proj", "index_q_proj", "index_k_proj"):
        assert f"{layer}.self_attn.{name}.weight" in quantised
    assert f"{layer}.block_sparse_moe.shared_experts.up_proj.weight" in quantised
    assert f"{layer}.block_sparse_moe.gate.weight" not in quantised
    assert {each.format for each in plan.experts} == {"mxfp8"}
    exact = oracle(directory / "twin", torch.float32)
    bound = errors(oracle(directory / "twin", torch.bfloat16), exact)
    with hmc.Engine(plan, threads=2) as engine:
        for logits in (engine.logits, engine.decode_logits):
            ours = errors(logits(prompt()), exact)
            assert np.median(ours) <= 1.5 * np.median(bound)
            assert (ours > 0.05).mean() <= (bound > 0.05).mean() + 0.2
