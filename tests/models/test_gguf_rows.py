"""Every architecture of GGUF files: a file of the family's tiny model, by the names and with the
metadata that llama.cpp's converters write, is the model of the directory that it was made from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf_files import unstacked, write_gguf
from gguf_metadata import ARCHITECTURES
from gguf_moves import LEFT, PERMUTED, permuted
from gguf_moves_states import changed
from parity import tiny_plan
from safetensors.torch import load_file
from tiny_models import prompt

import hmc
from hmc.checkpoint import Checkpoint
from hmc.checkpoint.gguf import GGUF_FAMILIES, GgufCheckpoint, open_gguf, settings_of
from hmc.checkpoint.gguf.header import read_gguf
from hmc.graph.printer import graph_text
from hmc.models import load
from hmc.passes.graph.trace import trace

Twin = tuple[Path, Path]

ONE_MSCALE = {"rope_scaling": {"mscale": 0.8}}
SAID: dict[str, dict[str, Any]] = {
    "afmoe": {"layer_types": None, "global_attn_every_n_layers": 4},
    "cohere2_moe": {"layer_types": ["full_attention", "sliding_attention", "full_attention"]},
    "deepseek_v2": ONE_MSCALE,
    "deepseek_v3": {"rope_scaling": None},
    "deepseek_v32": ONE_MSCALE,
    "granitemoehybrid": {"time_step_limit": None},
    "gpt_oss": {"swiglu_limit": 7.0},
    "llama4": {
        "text_config": {
            "attention_chunk_size": 8192,
            "floor_scale": 8192,
            "no_rope_layer_interval": 4,
            "rope_scaling": {"original_max_position_embeddings": 8192},
        }
    },
    "olmoe": {"clip_qkv": None},
    "solar_open": {"partial_rotary_factor": 1.0},
    "step3p5": {"rope_scaling": {"original_max_position_embeddings": 131072}},
}
"""What files do not say, as in published models."""
_LIKE_FILES = {"quantization_config": {"quant_method": "gguf"}}
FILED = {
    **dict.fromkeys(("jamba", "kimi_linear", "nemotron_h", "granitemoehybrid"), _LIKE_FILES),
    "qwen3_5_moe": {**_LIKE_FILES, "zero_centered": False},
    "qwen3_next": {**_LIKE_FILES, "zero_centered": False, "grouped_projections": ["ba"]},
    "step3p5": {"zero_centered": False},
}
"""What is another way to say the same in files."""
ALIASES = {"cohere2_moe": "cohere2moe"}
"""Architectures by other names."""
FAMILIES = sorted(ARCHITECTURES)
ALL = pytest.mark.parametrize("family", FAMILIES)


@pytest.fixture
def twin(tiny: Callable[..., Path], tmp_path: Path) -> Callable[[str], Twin]:
    """`twin(family)`: a directory and a GGUF file of it, matrices in F32."""

    def get(family: str, kind: str = "F32", **options: Any) -> Twin:
        source, directory = tiny(family), tmp_path / "published"
        config = json.loads((source / "config.json").read_text())
        _say(config, SAID.get(family, {}))
        directory.mkdir()
        (directory / "config.json").write_text(json.dumps(config))
        (directory / "model.safetensors").symlink_to(source / "model.safetensors")
        return directory, write_gguf(tmp_path / "model.gguf", directory, kind, **options)

    return get


def _say(config: dict[str, Any], said: dict[str, Any]) -> None:
    for key, value in said.items():
        if isinstance(value, dict):
            _say(config[key], value)
        else:
            config[key] = value


def test_every_architecture_is_tested() -> None:
    assert set(GGUF_FAMILIES) == {*ARCHITECTURES.values(), *ALIASES}
    for other, name in ALIASES.items():
        assert GGUF_FAMILIES[other] is GGUF_FAMILIES[name]


@pytest.mark.few(16)
@ALL
def test_the_model_is_the_same(family: str, twin: Callable[[str], Twin]) -> None:
    """Traced: every op with its attributes, and shapes of weights."""
    directory, path = twin(family)
    published = Checkpoint.open(directory).config.with_text(**FILED.get(family, {}))
    moved = r"|interleaved=\S+" if family in PERMUTED else ""
    found, expected = (
        re.sub(rf"=[a-z]\S*\[{moved}", "", graph_text(trace(load(each).module).graph))
        for each in (open_gguf(path).config, published)
    )
    assert found == expected


@pytest.mark.few(16)
@ALL
def test_tensors_are_found_by_published_names(family: str, twin: Callable[[str], Twin]) -> None:
    """With the values that the directory has, and none beside; a plan takes them all."""
    directory, path = twin(family)
    tiny_plan(path)
    opened = open_gguf(path)
    config = json.loads((directory / "config.json").read_text())
    expected = dict(_apart(load_file(directory / "model.safetensors"), config))
    read = {name for name in opened.tensors if not re.match(r".*\.weight\[", name)}
    left = {name for name in expected if re.search(LEFT.get(family, "^$"), name)}
    assert read == expected.keys() - left
    for name in read:
        values = _values(opened, name)
        wanted = expected[name].float().numpy().reshape(values.shape)
        assert np.array_equal(values, wanted), name


def test_of_data_the_settings_alone_are_read(twin: Callable[..., Twin], tmp_path: Path) -> None:
    """As by whoever has no more of a file than that."""
    _, path = twin("phimoe")
    head, hollow = read_gguf(path), tmp_path / "hollow.gguf"
    data = path.read_bytes()
    with hollow.open("wb") as file:
        file.write(data[: head.shard.header_bytes])
        for tensor in settings_of(head):
            file.seek(tensor.offset)
            file.write(data[tensor.offset : tensor.offset + tensor.nbytes])
        file.truncate(len(data))
    assert [tensor.name for tensor in settings_of(head)]
    assert open_gguf(hollow).config.values == open_gguf(path).config.values


@pytest.mark.slow
@ALL
def test_the_same_tokens(family: str, twin: Callable[..., Twin]) -> None:
    answers = []
    for location in twin(family, "BF16", split_kv_b=True):
        with hmc.Engine(tiny_plan(location), threads=2) as engine:
            answers.append(list(engine.generate(prompt()[:11], max_new_tokens=8).token_ids))
    assert answers[0] == answers[1] and len(answers[0]) > 1


def _values(opened: GgufCheckpoint, name: str) -> np.ndarray:
    info = opened.tensors[name]
    assert info.dtype == "F32"
    data = np.memmap(opened.location, np.uint8, "r")[info.offset : info.offset + info.nbytes]
    return data.view(np.float32).reshape(info.shape)


def _apart(
    tensors: dict[str, torch.Tensor], config: dict[str, Any]
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors as files have them: rows of some families moved, experts and gate and up apart."""
    kind = config["model_type"]
    text = config.get("text_config", config)
    heads = {"q": text["num_attention_heads"], "k": text.get("num_key_value_heads")}
    for name, tensor in changed(tensors, {**config, **text, "model_type": kind}).items():
        if config["model_type"] in PERMUTED and (turned := re.search(r"\.([qk])_proj", name)):
            yield name, permuted(tensor, heads[turned[1]])
        elif config["model_type"] in STACKS and re.search(STACKED, name):
            yield from STACKS[config["model_type"]](name, tensor)
        elif kind == "qwen3_5_moe":
            yield from unstacked(name, tensor).items()
        elif config["model_type"] == "qwen3_vl_moe":
            yield name.replace(".language_model", ""), tensor
        elif config["model_type"] == "step3p5" and name.endswith("norm.weight"):
            yield name, tensor.float() + 1
        elif name.endswith("gate.expert_bias"):  # Sarvam's
            yield name, tensor - tensor.mean()
        else:
            yield name, tensor


STACKED = r"\.(experts|moe)\.(gate_up|gate|up|down)_proj|(input|output)_linear"


def _of_granite(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    if "shared" in name:
        if "output" in name:
            yield name, tensor
            return
        for role, half in zip(("gate", "up"), tensor.chunk(2), strict=True):
            yield name.replace("input_linear", f"{role}_proj"), half
        return
    stem = name.split(".block_sparse_moe")[0] + ".mlp.experts"
    roles = ("down",) if "output" in name else ("gate", "up")
    for e, one in enumerate(tensor):
        for role, part in zip(roles, one.chunk(len(roles)), strict=True):
            yield f"{stem}.{e}.{role}_proj.weight", part


def _of_gpt_oss(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    stem, what = name.split(".experts.")
    end = "bias" if what.endswith("_bias") else "weight"
    for e, one in enumerate(tensor):
        rows = one if end == "bias" else one.mT
        if "down" in what:
            yield f"{stem}.experts.{e}.down_proj.{end}", rows
            continue
        for place, role in enumerate(("gate", "up")):
            yield f"{stem}.experts.{e}.{role}_proj.{end}", rows[place::2]


def _of_qwen3_vl(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    return _by_rows(name.replace(".language_model", ""), tensor.mT)


def _of_llama4(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    return _by_rows(name, tensor.mT)


def _by_rows(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    stem, what = name.split(".experts.")
    roles = ("down",) if "down" in what else ("gate", "up")
    for e, one in enumerate(tensor):
        for role, part in zip(roles, one.chunk(len(roles)), strict=True):
            yield f"{stem}.experts.{e}.{role}_proj.weight", part


def _of_step(name: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    for e, one in enumerate(tensor):
        yield name.replace(".moe.", f".moe.{e}."), one


STACKS = {"gpt_oss": _of_gpt_oss, "granitemoe": _of_granite, "granitemoeshared": _of_granite,
          "granitemoehybrid": _of_granite, "gemma4": _by_rows, "llama4": _of_llama4,
          "mistral4": _by_rows,
          "qwen3_vl_moe": _of_qwen3_vl, "step3p5": _of_step}  # fmt: skip
"""Families whose published experts are stacked."""
