"""Families with Mamba 2 as their published configurations differ from the tiny ones, against
transformers; and what such a configuration must say.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from parity import errors, tiny_plan
from played import executor
from reference import load_model, run
from split_plans import DUAL, split_plan
from tiny_models import oracle, prompt, write

import hmc
from hmc.checkpoint.config import ModelConfig, load_config
from hmc.errors import ConfigError, UnsupportedError, VerifyError
from hmc.models import load
from hmc.plan import verify_plan

KINDS = ["mamba", "moe", "attention", "mlp", "mamba", "moe"]
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "rope": ("granitemoehybrid", {"position_embedding_type": "rope"}),
    "no experts": ("granitemoehybrid", {"num_local_experts": 0, "num_experts_per_tok": 0}),
    "biases": ("granitemoehybrid", {"mamba_proj_bias": True, "mamba_conv_bias": False}),
    "no limit": ("granitemoehybrid", {"time_step_limit": None, "mamba_d_head": "auto"}),
    "layers by name": (
        "nemotron_h",
        {"hybrid_override_pattern": None, "num_hidden_layers": None, "layers_block_type": KINDS},
    ),
    "wide experts": ("nemotron_h", {"moe_latent_size": None, "n_group": 4, "topk_group": 2}),
    "biases of all": (
        "nemotron_h",
        {"mlp_bias": True, "use_bias": True, "moe_latent_size": None},
    ),
}


@pytest.mark.few(1)
@pytest.mark.parametrize("name", VARIANTS)
def test_variants(name: str, tmp_path: Path) -> None:
    family, changes = VARIANTS[name]
    directory = write(tmp_path / "model", family, **changes)
    exact = oracle(directory, torch.float32)
    blocks = run(load_model(directory).module, prompt()).numpy()
    assert np.abs(blocks - exact).max() < 2e-4 * np.abs(exact).max()


def test_a_plan_says_whether_experts_have_gates(tiny: Callable[..., Path]) -> None:
    plan = tiny_plan(tiny("nemotron_h"))
    assert {each.role for each in plan.experts} == {"up", "down"}
    phase = plan.phase("decode")
    at = next(n for n, step in enumerate(phase.steps) if step.op == "experts")
    gated = {**phase.steps[at].attrs, "act": "silu(gate) * up"}
    steps = list(phase.steps)
    steps[at] = steps[at].model_copy(update={"attrs": gated})
    others = [each for each in plan.phases if each.name != "decode"]
    wrong = plan.model_copy(
        update={"phases": (*others, phase.model_copy(update={"steps": tuple(steps)}))}
    )
    with pytest.raises(VerifyError, match="its layer has no gate"):
        verify_plan(wrong)
    half = tuple(each for each in plan.experts if each.role == "up")
    with pytest.raises(VerifyError, match="experts are not as many"):
        verify_plan(plan.model_copy(update={"experts": half}))


@pytest.mark.slow
@pytest.mark.parametrize("gpus", [1, 2])
def test_two_lanes_of_layers_of_one_half(gpus: int, tiny: Callable[..., Path]) -> None:
    """Two sequences that two lanes decode have the logits of each alone."""
    directory = tiny("nemotron_h")
    prompts = [prompt(9), prompt(14)]
    with hmc.Engine(tiny_plan(directory), threads=2) as engine:
        expected = [engine.decode_logits(ids)[-1] for ids in prompts]
    plan = split_plan(directory, gpus=gpus, switches=True)
    with executor(plan, directory) as found:
        sequences = [found.open() for _ in prompts]
        for sequence, ids in zip(sequences, prompts, strict=True):
            assert list(found.prefill(sequence, np.array(ids[:-1], np.int32)))
        rows = found.decode(sequences, np.array([ids[-1] for ids in prompts], np.int32))
        assert found.calls[DUAL] == 1
        assert np.median(errors(np.stack(rows), np.stack(expected))) < 0.03


@pytest.mark.parametrize(
    ("family", "changes", "named"),
    [
        ("nemotron_h", {"time_step_limit": [1.0]}, "time_step_limit"),
        ("nemotron_h", {"time_step_limit": [2.0, 1.0]}, "time_step_limit"),
        ("nemotron_h", {"time_step_limit": ["0", "1"]}, "time_step_limit"),
        ("nemotron_h", {"n_groups": 4}, "n_groups"),
        ("nemotron_h", {"conv_kernel": 1}, "conv_kernel"),
        ("nemotron_h", {"hybrid_override_pattern": "MEX*-MEM"}, "hybrid_override_pattern"),
        ("nemotron_h", {"hybrid_override_pattern": "ME*"}, "hybrid_override_pattern"),
        ("nemotron_h", {"mlp_hidden_act": "mish"}, "mlp_hidden_act"),
        ("nemotron_h", {"mamba_hidden_act": "mish"}, "mamba_hidden_act"),
        ("nemotron_h", {"sliding_window": 64}, "sliding_window"),
        ("granitemoehybrid", {"mamba_d_head": 47}, "mamba_d_head"),
        ("granitemoehybrid", {"layer_types": ["mamba"]}, "layer_types"),
    ],
)
def test_what_cannot_be_is_named(
    family: str, changes: dict[str, Any], named: str, tiny: Callable[..., Path]
) -> None:
    config: ModelConfig = load_config(tiny(family)).with_text(**changes)
    with pytest.raises((ConfigError, UnsupportedError), match=named):
        load(config)
