"""Rotary frequencies of both config formats, bit for bit those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hmc.checkpoint.config import ModelConfig
from hmc.models.rope import rope

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
    {"rope_type": "yarn", "factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.7},
    {"rope_type": "yarn", "factor": 2.0, "attention_factor": 1.5, "beta_fast": 16, "beta_slow": 2},
    {"rope_type": "yarn", "factor": 2.0, "truncate": False},
]


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_scaled_frequencies_equal_transformers(scaling: dict[str, Any], key: str) -> None:
    theta, context = 5e5, 131072
    theirs = MixtralConfig(
        head_dim=96,
        max_position_embeddings=context,
        rope_parameters={"rope_theta": theta, **scaling},
    )
    inv_freq, factor = ROPE_INIT_FUNCTIONS[scaling["rope_type"]](theirs)
    values: dict[str, Any] = {"max_position_embeddings": context}
    if key == "rope_scaling":  # as on the hub
        kind = {"type": scaling["rope_type"]}
        rest = {name: value for name, value in scaling.items() if name != "rope_type"}
        values |= {"rope_theta": theta, key: kind | rest}
    else:
        values[key] = {"rope_theta": theta, **scaling}
    ours = rope(_config(values), 96)
    assert ours.inv_freq == tuple(inv_freq.tolist())
    assert ours.factor == factor


@pytest.mark.parametrize("section", [{}, {"rope_scaling": None}, {"rope_parameters": {}}])
def test_default_frequencies(section: dict[str, Any]) -> None:
    ours = rope(_config(section), 10, default_theta=500.0)
    expected = 500.0 ** (-torch.arange(0, 10, 2, dtype=torch.float64) / 10)
    torch.testing.assert_close(torch.tensor(ours.inv_freq), expected.float())
    assert (ours.factor, ours.mscale) == (1.0, 1.0)


def test_mscale_is_that_of_deepseek() -> None:
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    ours = rope(_config({"max_position_embeddings": 163840, "rope_scaling": yarn}), 64)
    assert ours.factor == 1.0
    assert ours.mscale == pytest.approx(1.3688879)  # 0.1 ln 40 + 1


def _config(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(Path("config.json"), values, "")
