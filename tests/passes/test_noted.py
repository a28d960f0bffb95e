"""What a checkpoint holds and asks for beside weights stands in the plan with its reason."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from checkpoints import write_checkpoint
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import hmc
from hmc.cli.show_command import command
from hmc.errors import TensorError
from hmc.plan import save_plan


def _with(tensors: dict[str, tuple[int, ...]], directory: Path) -> Path:
    """A checkpoint of FP8 with more tensors in it."""
    write_checkpoint(directory, "mixtral", "fp8", layers=1)
    file = directory / "model.safetensors"
    more = {name: torch.ones(shape) for name, shape in tensors.items()}
    save_file({**load_file(file), **more}, file)
    return directory


def test_what_is_left_aside_is_shown(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.{each}_proj.input_scale" for each in "qkv"]
    plan = hmc.compile(_with(dict.fromkeys(names, (1,)), tmp_path / "model"))
    noted = [each for each in plan.decisions if each.by == "checkpoint"]
    assert [(each.subject, each.choice) for each in noted] == [
        ("activations", "BF16"),
        (f"{names[1]} and 2 more", "3 left aside"),
    ]
    save_plan(plan, tmp_path / "plan.hmp")
    shown = CliRunner().invoke(command, [str(tmp_path / "plan.hmp")]).output
    assert "3 left aside" in shown and "activation_scheme is dynamic" in " ".join(shown.split())


def test_a_scale_that_nobody_reads_is_refused(tmp_path: Path) -> None:
    name = "model.layers.0.self_attn.q_proj.weight_scale_2"
    with pytest.raises(TensorError, match=f"1 tensor belongs beside a weight.*{name}"):
        hmc.compile(_with({name: (1,)}, tmp_path))
