"""Activations of MLPs by name, with limits, weights and biases, against transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import GptOssConfig
from transformers.activations import ACT2FN
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from hmc.blocks.pointwise import activated
from hmc.checkpoint.config import ModelConfig
from hmc.codegen.expr import SWIGLU
from hmc.codegen.expr import activation as checked
from hmc.errors import UnsupportedError
from hmc.models.activations import ACTIVATIONS, activation, gated, weighed

GATE, UP = (4 * torch.randn(50, 8, generator=torch.Generator().manual_seed(n)) for n in range(2))


def config(**values: str) -> ModelConfig:
    return ModelConfig(Path("config.json"), dict(values), "")


@pytest.mark.parametrize("name", sorted(set(ACTIVATIONS) - {"gelu_python"}))
def test_every_name_is_transformers_own(name: str) -> None:
    text = activation(config(hidden_act=name))
    exact = ACT2FN[name](GATE) * UP
    torch.testing.assert_close(activated(text, GATE, UP), exact, rtol=1e-5, atol=1e-5)


def test_names_that_nobody_gave() -> None:
    assert activation(config()) == SWIGLU
    assert activation(config(hidden_activation="relu2")) == "square(relu(gate)) * up"
    with pytest.raises(UnsupportedError, match="hidden_act is 'mish'; hmc reads one of silu"):
        activation(config(hidden_act="mish"))


def test_limits() -> None:
    experts = GptOssExperts(  # type: ignore[no-untyped-call]
        GptOssConfig(hidden_size=8, intermediate_size=8, num_local_experts=1)
    )
    both = torch.stack((GATE, UP), -1).flatten(-2)
    ours = gated("gate * sigmoid(1.702 * gate)", limit=7.0, plus=1.0)
    torch.testing.assert_close(activated(ours, GATE, UP), experts._apply_gate(both))
    before, after = gated("silu(gate)", limit=2.0), gated("silu(gate)", limit=2.0, after=True)
    silu, up = torch.nn.functional.silu, UP.clamp(-2, 2)
    torch.testing.assert_close(activated(before, GATE, UP), silu(GATE.clamp(max=2)) * up)
    torch.testing.assert_close(activated(after, GATE, UP), silu(GATE).clamp(max=2) * up)


def test_weights_on_the_input() -> None:
    text, weight = weighed(SWIGLU), torch.rand(50, 1)
    exact = torch.nn.functional.silu(GATE * weight) * (UP * weight)
    torch.testing.assert_close(activated(text, GATE, UP, weight), exact)
    assert set(checked(text, ("gate", "up", "weight")).leaves) == {"gate", "up", "weight"}
