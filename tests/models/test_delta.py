"""Families with delta nets as they are published beside BF16: in FP8 blocks, bounded, and what of
their configurations is refused.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import errors, tiny_plan
from tiny_models import oracle, prompt, write

import hmc
from hmc.blocks import Experts, GatedMLP
from hmc.checkpoint.config import load_config
from hmc.errors import HmcError
from hmc.models import load

pytest.importorskip("compressed_tensors")  # of the extra "test"
from stored_weights import STORED, store

FP8 = STORED["fp8"]
SIZES: dict[str, Any] = {
    "head_dim": 128,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
"""Blocks of scales are of rows of one head, as with published sizes."""
KEPT = ["lm_head", "mlp.gate", "shared_expert_gate", "in_proj_ba", "in_proj_b", "in_proj_a"]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["qwen3_next", "qwen3_5_moe"])
def test_fp8_blocks_with_a_tensor_an_expert(family: str, tmp_path: Path) -> None:
    """The rows of q and its gate, of q, k, v and z, lie head by head in tensors of codes."""
    plain = write(tmp_path / "plain", family, stacks=False, **SIZES)
    section = {**FP8.section, "modules_to_not_convert": KEPT}
    directory = store(
        tmp_path / "fp8", plain, lambda name: None if ".visual." in name else FP8, section
    )
    plan = tiny_plan(directory)
    assert {each.format for each in plan.experts} == {"fp8"}
    assert any(plane.pick and plane.name != "codes" for w in plan.weights for plane in w.planes)
    exact = oracle(directory / "twin", torch.float32)
    bound = errors(oracle(directory / "twin", torch.bfloat16), exact)
    with hmc.Engine(plan, threads=2) as engine:
        for logits in (engine.logits, engine.decode_logits):
            found = errors(logits(prompt()), exact)
            assert np.median(found) <= 1.5 * np.median(bound)


def test_bounds_of_ling(tiny: Callable[..., Path]) -> None:
    """Which transformers does not know: experts and shared experts have them by layer."""
    config = load_config(tiny("bailing_hybrid"))
    config = config.with_text(
        expert_swiglu_limit_list=[0, 0, 4.0, 0], share_expert_swiglu_limit_list=[0, 0, 0, 7.0]
    )
    module = load(config).module
    found = {
        path: block.act
        for path, block in module.named_modules()
        if isinstance(block, Experts | GatedMLP)
    }
    bounded = {path for path, act in found.items() if "minimum" in act}
    assert bounded == {"model.layers.2.mlp.experts", "model.layers.3.mlp.shared_experts"}
    assert found["model.layers.2.mlp.experts"] == (
        "minimum(silu(gate), 4.0) * minimum(maximum(up, -4.0), 4.0)"
    )


@pytest.mark.parametrize(
    ("family", "changes", "said"),
    [
        (
            "qwen3_next",
            {"linear_num_key_heads": 4},
            "linear_num_key_heads is 4, must divide the 6 heads",
        ),
        ("qwen3_next", {"attention_bias": True}, "attention_bias"),
        ("qwen3_next", {"layer_types": ["full_attention", "other"]}, "layer_types must say"),
        ("qwen3_5_moe", {"norm_topk_prob": False}, "norm_topk_prob"),
        ("kimi_linear", {"linear_attn_config": None}, "linear_attn_config is missing"),
        ("kimi_linear", {"mla_use_nope": False}, "mla_use_nope"),
        ("bailing_hybrid", {"short_conv_kernel_size": None}, "2.5 and 2.6"),
        ("bailing_hybrid", {"expert_swiglu_limit_list": [4.0]}, "a number for each of 4 layers"),
    ],
)
def test_what_is_refused(
    family: str, changes: dict[str, Any], said: str, tiny: Callable[..., Path]
) -> None:
    with pytest.raises(HmcError, match=said):
        load(load_config(tiny(family)).with_text(**changes))


def test_layers_are_linear_or_full(tiny: Callable[..., Path]) -> None:
    """Kimi counts them from 1."""
    config = load_config(tiny("kimi_linear"))
    settings = config.values["linear_attn_config"]
    for wrong in ({"kda_layers": [1, 2]}, {"full_attn_layers": [3, 4]}, {"kda_layers": [0, 1, 2]}):
        with pytest.raises(HmcError, match="kda_layers and full_attn_layers must share 4 layers"):
            load(config.with_text(linear_attn_config={**settings, **wrong}))
