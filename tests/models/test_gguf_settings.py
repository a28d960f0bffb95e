"""Metadata of GGUF files that mean what tiny models do not have, and such that no row reads: one
line that says which and why.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import gguf_moves
import gguf_moves_states
import pytest
import torch
from gguf_files import write_gguf
from gguf_metadata import ARCHITECTURES
from parity import tiny_plan

from hmc.checkpoint.gguf import open_gguf
from hmc.errors import ConfigError, HmcError, TensorError, UnsupportedError

Filed = Callable[..., Path]


@pytest.fixture
def filed(tiny: Callable[..., Path], tmp_path: Path) -> Filed:
    """`filed(family, **keys)`: a GGUF file of the family's tiny model with further metadata."""
    return lambda family, **keys: write_gguf(tmp_path / "a.gguf", tiny(family), **keys)


@pytest.mark.parametrize(
    ("family", "keys", "said"),
    [
        ("exaone_moe", {"attention.sliding_window_pattern": None}, "must be one for each layer"),
        ("gemma4", {"expert_count": None}, "a gemma4 without experts"),
        ("kimi_linear", {"kda.head_dim": None}, r"kda\.head_dim"),
        ("laguna", {"expert_gating_func": 1}, r"laguna\.expert_gating_func is 1"),
        ("llama4", {}, r"other factors .* with 1 to 1 turns in 8192 tokens"),
        ("mistral4", {"attention.temperature_length": 32}, r"temperature_length is 32"),
        ("sarvam_moe", {"rope.dimension_count": 24}, r"rope\.dimension_count is 24"),
        ("step3p5", {"swiglu_clamp_exp": [float("inf")] * 4}, "must be finite numbers"),
        ("step3p5", {"attention.head_count": [6, 4]}, "must be one for each layer"),
    ],
)
def test_metadata_that_no_row_reads(
    filed: Filed, monkeypatch: pytest.MonkeyPatch, family: str, keys: dict[str, Any], said: str
) -> None:
    monkeypatch.delitem(gguf_moves.FACTORS, "step3p5")
    with pytest.raises(HmcError, match=said) as caught:
        open_gguf(filed(family, **keys))
    assert isinstance(caught.value, ConfigError | UnsupportedError)
    assert "a.gguf" in str(caught.value) and "\n" not in str(caught.value)


def test_pairs_that_stand_among_those_that_turn(
    filed: Filed, monkeypatch: pytest.MonkeyPatch
) -> None:
    factors = torch.tensor([1.0, 1e30] * 24)
    monkeypatch.setitem(
        gguf_moves.FACTORS, "gemma4", lambda config: iter([("rope_freqs.weight", factors)])
    )
    with pytest.raises(UnsupportedError, match=r"rope_freqs\.weight' is not one factor"):
        open_gguf(filed("gemma4"))


def test_factors_that_are_missing(tiny: Callable[..., Path], tmp_path: Path) -> None:
    config = json.loads((tiny("phimoe") / "config.json").read_text())
    del config["rope_scaling"]["short_factor"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(tiny("phimoe") / "model.safetensors")
    path = write_gguf(tmp_path / "a.gguf", tmp_path)
    with pytest.raises(TensorError, match=r"rope_factors_short\.weight' is missing"):
        open_gguf(path)


def test_mistral_large_is_called_deepseek2(filed: Filed, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were made of Mistral's own format; the growth of queries tells them."""
    monkeypatch.setitem(ARCHITECTURES, "mistral4", "deepseek2")
    monkeypatch.setitem(gguf_files.LIKE, "deepseek2", "mistral4")
    own = {"attention.temperature_scale": 0.2, "attention.temperature_length": 16}
    config = open_gguf(filed("mistral4", expert_gating_func=1, **own)).config
    assert config.values["model_type"] == "mistral4"
    assert config.values["rope_parameters"]["llama_4_scaling_beta"] == 0.2


def test_llama4_without_chunks(filed: Filed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(gguf_moves.FACTORS, "llama4")
    values = open_gguf(filed("llama4", **{"attention.sliding_window": 0})).config.values
    assert values["attention_chunk_size"] is None and values["no_rope_layers"] == [1, 1, 1]
    assert "rope_scaling" not in values and values["use_qk_norm"]


def test_qwen3_next_with_z_beside_keys(filed: Filed, monkeypatch: pytest.MonkeyPatch) -> None:
    """As files of 2025: projections lie as published."""
    monkeypatch.setitem(gguf_moves_states._CHANGES, "qwen3_next", gguf_moves_states._as_they_are)
    path = filed("qwen3_next")
    assert open_gguf(path).config.values["grouped_projections"] == ["qkvz", "ba"]
    tiny_plan(path)


def test_jamba_whose_layers_are_not_so_far_apart(
    filed: Filed, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = {"layers.3.feed_forward.router": "layers.2.feed_forward.router"}
    change = gguf_moves_states._as_they_are
    monkeypatch.setitem(
        gguf_moves_states._CHANGES,
        "jamba",
        lambda name, *rest: change(re.sub("|".join(called), lambda m: called[m[0]], name), *rest),
    )
    with pytest.raises(UnsupportedError, match=r"layers \[1, 2\] are no expert_layer_period apart"):
        open_gguf(filed("jamba"))


def test_laguna_without_windows(filed: Filed) -> None:
    window = {"attention.sliding_window": None}
    values = open_gguf(filed("laguna", **window)).config.values
    assert values["layer_types"] == ["full_attention"] * 3 and values["gating"] == "per-head"
