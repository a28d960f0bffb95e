"""Model files against transformers in float32: the architecture, before any kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import FAMILIES, oracle_logits, prompt
from dealt import dealt
from reference import load_model, run

from hmc.checkpoint.config import ModelConfig, load_config
from hmc.errors import ConfigError, UnsupportedError
from hmc.models import load, weight_specs
from hmc.passes.graph.trace import trace

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"

VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("qwen3_moe", {}),
    "qwen3_moe all routed, no bias, tied": (
        "qwen3_moe",
        {"mlp_only_layers": [], "attention_bias": False, "tie_word_embeddings": True},
    ),
    "qwen3_moe every other, plain weights, yarn": (
        "qwen3_moe",
        {
            "mlp_only_layers": [],
            "decoder_sparse_step": 2,
            "norm_topk_prob": False,
            "rope_scaling": {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 256,
            },
        },
    ),
    "mixtral": ("mixtral", {}),
    "mixtral head_dim, untied, linear rope": (
        "mixtral",
        {
            "head_dim": 48,
            "tie_word_embeddings": False,
            "sliding_window": 1024,
            "rope_scaling": {"rope_type": "linear", "factor": 2.0},
        },
    ),
    "deepseek_v3": ("deepseek_v3", {}),
    "deepseek_v3 direct query, halves": (
        "deepseek_v3",
        {"q_lora_rank": None, "rope_interleave": False, "attention_bias": True},
    ),
    "deepseek_v3 one group, no rope scaling": (
        "deepseek_v3",
        {
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": False,
            "first_k_dense_replace": 0,
            "n_shared_experts": 1,
            "rope_scaling": None,
            "tie_word_embeddings": True,
        },
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_reference_equals_transformers(checkpoint: Callable[..., Path], variant: str) -> None:
    family, overrides = VARIANTS[variant]
    directory = checkpoint(family, "f32", **overrides)
    model = load_model(directory)
    for length in (1, 7, 64):
        ids = prompt(length)
        expected = oracle_logits(directory, ids)
        error = np.abs(run(model.module, ids).numpy() - expected).max() / np.abs(expected).max()
        assert error < 1e-4, f"{length} tokens: {error}"


@pytest.mark.parametrize(
    ("quant", "family"), dealt(["fp8", "bf16", "int4", "fp16"], sorted(FAMILIES))
)
def test_reference_equals_transformers_quantised(
    checkpoint: Callable[..., Path], quant: str, family: str
) -> None:
    directory = checkpoint(family, quant, shards=2)
    ids = prompt(33)
    expected = oracle_logits(directory, ids)
    actual = run(load_model(directory).module, ids).numpy()
    assert np.abs(actual - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("family", FAMILIES)
def test_graph_runs_as_the_module(checkpoint: Callable[..., Path], family: str) -> None:
    module = load_model(checkpoint(family, "bf16")).module
    ids = prompt(19)
    assert torch.equal(run(trace(module), ids), run(module, ids))


@pytest.mark.parametrize(
    ("name", "billions", "active"),
    [
        ("deepseek-v3", 671.03, 36.6),
        ("qwen3-30b-a3b", 30.53, 3.04),
        ("mixtral-8x7b", 46.70, 12.7),
    ],
)
def test_info_of_real_shapes(name: str, billions: float, active: float) -> None:
    info = load(load_config(CONFIGS / name)).info
    assert info.parameters / 1e9 == pytest.approx(billions, abs=0.01)
    assert info.active_parameters / 1e9 == pytest.approx(active, abs=0.06)


def test_info_fields() -> None:
    info = load(load_config(CONFIGS / "deepseek-v3")).info
    assert (info.family, info.hidden, info.layers, info.vocab) == ("deepseek_v3", 7168, 61, 129280)
    assert (info.experts, info.top_k, info.context) == (256, 8, 163840)
    assert info.eos_token_ids == (1,)


def test_info_counts_stored_weights(checkpoint: Callable[..., Path]) -> None:
    for family in FAMILIES:  # among them a tied output layer
        model = load_model(checkpoint(family, "f32"))
        size = (checkpoint(family, "f32") / "model.safetensors").stat().st_size
        assert 0 < size - 4 * model.info.parameters < 100_000  # the header


def test_tied_output_layer_is_the_table(checkpoint: Callable[..., Path]) -> None:
    specs = weight_specs(load(load_config(checkpoint("mixtral", "f32"))).module)
    assert "lm_head.weight" not in specs
    assert not specs["model.embed_tokens.weight"].linear


def test_layers_that_look_ahead_are_tolerated(config: Callable[..., ModelConfig]) -> None:
    model = load(config("deepseek_v3", num_nextn_predict_layers=2))
    patterns = [each.pattern for each in model.aside]
    assert patterns == ["*.layers.3.*", "*.layers.4.*"]
    assert load(config("mixtral")).aside == ()


@pytest.mark.parametrize(
    ("family", "changes", "error", "words"),
    [
        ("mixtral", {"model_type": "llama"}, UnsupportedError, ["llama", "mixtral", "--family"]),
        ("mixtral", {"model_type": None}, ConfigError, ["model_type"]),
        ("mixtral", {"hidden_act": "mish"}, UnsupportedError, ["hidden_act", "mish", "silu"]),
        ("mixtral", {"sliding_window": 512}, UnsupportedError, ["sliding_window 512", "1024"]),
        ("qwen3_moe", {"sliding_window": 9, "use_sliding_window": True}, UnsupportedError, ["9"]),
        ("qwen3_moe", {"num_key_value_heads": 4}, ConfigError, ["num_key_value_heads", "6 heads"]),
        ("qwen3_moe", {"num_experts_per_tok": 9}, ConfigError, ["num_experts_per_tok", "8"]),
        ("qwen3_moe", {"hidden_size": "192"}, ConfigError, ["hidden_size", "whole number"]),
        ("qwen3_moe", {"num_hidden_layers": None}, ConfigError, ["num_hidden_layers", "null"]),
        ("deepseek_v3", {"scoring_func": "softmax"}, UnsupportedError, ["scoring_func"]),
        ("deepseek_v3", {"topk_method": "greedy"}, UnsupportedError, ["topk_method", "greedy"]),
        ("deepseek_v3", {"n_group": 5}, ConfigError, ["n_group", "16 experts"]),
        ("deepseek_v3", {"topk_group": 5}, ConfigError, ["topk_group", "4 groups"]),
        ("deepseek_v3", {"num_experts_per_tok": 9}, ConfigError, ["topk_group", "choose 9"]),
        (
            "deepseek_v3",
            {"rope_parameters": {"rope_type": "longrope"}},
            UnsupportedError,
            ["rope_parameters.rope_type", "longrope", "yarn"],
        ),
        (
            "mixtral",
            {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}},
            UnsupportedError,
            ["partial_rotary_factor"],
        ),
        (
            "mixtral",
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            UnsupportedError,
            ["rope_parameters.full_attention", "layer type"],
        ),
        ("mixtral", {"rope_theta": 1, "rope_parameters": None}, ConfigError, ["rope_theta"]),
        ("mixtral", {"head_dim": 31}, ConfigError, ["31"]),
    ],
)
def test_what_hmc_cannot_is_named(
    config: Callable[..., ModelConfig],
    family: str,
    changes: dict[str, Any],
    error: type[Exception],
    words: list[str],
) -> None:
    with pytest.raises(error) as caught:
        load(config(family, **changes))
    message = str(caught.value)
    assert "config.json" in message
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def config(checkpoint: Callable[..., Path]) -> Callable[..., ModelConfig]:
    """`config(family, **changes)`: a small valid config.json with keys changed."""

    def make(family: str, **changes: Any) -> ModelConfig:
        directory = checkpoint(family, "f32")
        values = json.loads((directory / "config.json").read_text())
        return ModelConfig(directory / "config.json", {**values, **changes}, "")

    return make


def test_more_layers_than_there_can_be() -> None:
    config = load_config(CONFIGS / "qwen3-30b-a3b")
    wrong = ModelConfig(config.path, {**config.values, "num_hidden_layers": 10**12}, config.sha256)
    with pytest.raises(ConfigError, match="num_hidden_layers is 1000000000000; hmc builds 4096"):
        load(wrong)
