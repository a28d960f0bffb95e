"""Rotary frequencies of both config formats, bit for bit those of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from transformers import MixtralConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hmc.checkpoint.config import ModelConfig
from hmc.errors import ConfigError, UnsupportedError
from hmc.models.rope import rope, short_context

SCALINGS: list[dict[str, Any]] = [
    {"rope_type": "linear", "factor": 3.0},
    {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    {  # a band without width, as Llama 4 Scout has it
        "rope_type": "llama3",
        "factor": 16.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 1.0,
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


def test_a_share_of_each_head() -> None:
    whole = rope(_config({"rope_theta": 500.0}), 12).inv_freq
    by_key = rope(_config({"rope_theta": 500.0, "partial_rotary_factor": 0.5}), 24, partial=1.0)
    assert rope(_config({"rope_theta": 500.0}), 24, partial=0.5).inv_freq == whole
    assert by_key.inv_freq == whole
    inside = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
    found = rope(_config({"rope_parameters": inside, "partial_rotary_factor": 1.0}), 24, partial=1)
    assert found.inv_freq == whole
    with pytest.raises(UnsupportedError, match="partial_rotary_factor is 0"):
        rope(_config({"partial_rotary_factor": 0.5}), 24)
    with pytest.raises(ConfigError, match=r"13 of 26 elements a head, must be even"):
        rope(_config({}), 26, partial=0.5)


def test_settings_by_layer_type() -> None:
    own = {"full_attention": {"rope_theta": 500.0}, "sliding_attention": {"rope_theta": 20.0}}
    config = _config({"rope_parameters": own, "rope_theta": 7.0})
    full, sliding = (
        rope(config, 8, layer_type=f"{kind}_attention") for kind in ("full", "sliding")
    )
    assert full.inv_freq == rope(_config({"rope_theta": 500.0}), 8).inv_freq
    assert sliding.inv_freq == rope(_config({"rope_theta": 20.0}), 8).inv_freq
    alike = _config({"rope_parameters": {"rope_theta": 500.0}})
    assert rope(alike, 8, layer_type="full_attention") == full
    with pytest.raises(UnsupportedError, match="by layer type"):
        rope(config, 8)


def test_an_empty_section_says_nothing() -> None:
    found = rope(_config({"rope_scaling": {}, "rope_parameters": {"rope_theta": 500.0}}), 8)
    assert found.inv_freq == rope(_config({"rope_theta": 500.0}), 8).inv_freq


def test_a_fixed_alpha_stretches_theta() -> None:
    scaling = {"type": "dynamic", "alpha": 1000.0, "factor": 1.0}
    found = rope(_config({"rope_theta": 10000.0, "rope_scaling": scaling}), 128)
    assert found.inv_freq[1] == pytest.approx((1e4 * 1000 ** (128 / 126)) ** (-1 / 64))
    with pytest.raises(UnsupportedError, match="alpha"):
        rope(_config({"rope_scaling": {"type": "dynamic", "factor": 2.0}}), 128)


@pytest.mark.parametrize(
    ("longrope", "seq_len", "mscale"), [("short", 4096, 1.25), ("long", 4097, 1.5)]
)
def test_longrope_has_factors_of_short_and_of_long_contexts(
    longrope: Literal["short", "long"], seq_len: int, mscale: float
) -> None:
    scaling = {
        "rope_type": "longrope",
        "original_max_position_embeddings": 4096,
        "short_mscale": 1.25,
        "long_mscale": 1.5,
        "short_factor": [1.0 + 0.07 * index for index in range(48)],
        "long_factor": [1.0 + index for index in range(48)],
    }
    settings = {"rope_theta": 5e5, **scaling}
    theirs = MixtralConfig(
        head_dim=96, max_position_embeddings=131072, rope_parameters=dict(settings)
    )
    inv_freq, _ = ROPE_INIT_FUNCTIONS["longrope"](theirs, seq_len=seq_len)
    values = {"max_position_embeddings": 131072, "rope_parameters": settings}
    ours = rope(_config(values), 96, longrope=longrope)
    assert ours.inv_freq == tuple(inv_freq.tolist())
    assert ours.factor == mscale
    assert short_context(_config(values)) == 4096
    assert short_context(_config({})) == 0
    with pytest.raises(UnsupportedError, match="longrope"):
        rope(_config(values), 96)
    settings[f"{longrope}_factor"] = [1.0]
    with pytest.raises(ConfigError, match=f"{longrope}_factor must be 48 numbers"):
        rope(_config(values), 96, longrope=longrope)


def test_mscale_is_that_of_deepseek() -> None:
    yarn = {"type": "yarn", "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0}
    ours = rope(_config({"max_position_embeddings": 163840, "rope_scaling": yarn}), 64)
    assert ours.factor == 1.0
    assert ours.mscale == pytest.approx(1.3688879)  # 0.1 ln 40 + 1


def _config(values: dict[str, Any]) -> ModelConfig:
    return ModelConfig(Path("config.json"), values, "")


@pytest.mark.parametrize("key", ["beta_fast", "beta_slow"])
def test_turns_below_zero(key: str) -> None:
    yarn = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, key: -1.0}
    with pytest.raises(ConfigError, match=rf"{key} is -1, must be above 0"):
        rope(_config({"max_position_embeddings": 256, "rope_scaling": yarn}), 64)
