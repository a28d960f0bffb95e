"""GGUF files as converters write them, made from checkpoints in a directory: the names are gguf's
own, and what is moved and joined on the way is what llama.cpp's conversion does.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf_metadata import ARCHITECTURES, METADATA
from gguf_moves import moved
from safetensors.torch import load_file, save_file

from hmc.formats.blocks import BLOCKS, put_scale

KEPT = re.compile(
    r"norm|bias|mlp\.(gate|router)\.(wg\.|gate\.)?weight|block_sparse_moe\.(gate|router)|expert_gate"
    r"|moe\.gate\.weight|\brouter\.|A_log|\.D$|conv1d|conv\.conv|(mixer|feed_forward)\.gate\.weight"
)
"""Tensors that converters keep in F32 whatever the type of the others."""
LIKE = {"cohere2moe": "dots1", "deepseek32": "glm-dsa", "hy_v3": "dots1", "laguna": "step35",
         "mellum": "qwen3moe"}  # fmt: skip
"""Architectures that gguf does not know yet, and one whose tensors are called alike."""
_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")


def write_gguf(
    path: Path,
    directory: Path,
    kind: str = "F32",
    *,
    split_kv_b: bool = False,
    old_experts: bool = False,
    split: int = 0,
    kinds: Mapping[str, str] | None = None,
    twin: Path | None = None,
    **keys: Any,
) -> Path:
    """A GGUF file at `path` of the checkpoint in `directory`, its matrices of type `kind`; those
    whose published name has a word of `kinds` in it of that one.

    Types that gguf cannot quantise to get random blocks. `twin` becomes a directory of the weights
    that the file means, in F32.

    `split_kv_b` has keys and values of the latent apart, as files of 2025 on have them;
    `old_experts` a tensor an expert, as those of early 2024; `split` tensors a file; `keys` are
    further metadata, `None` takes one away.
    """
    config = json.loads((directory / "config.json").read_text())
    tensors = {
        name: tensor.float()
        for shard in sorted(directory.glob("*.safetensors"))
        for name, tensor in load_file(shard).items()
    }
    name = ARCHITECTURES[config["model_type"]]
    config = {**config, **config.get("text_config", {}), "model_type": config["model_type"]}
    like = LIKE.get(name, name)
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == like)
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split)
    metadata = {**METADATA[config["model_type"]](config), **keys}
    for key, value in metadata.items():
        if value is not None:
            _add(
                writer,
                key if "." in key and key.split(".")[0] in _ROOTS else f"{name}.{key}",
                value,
            )
    names = gguf.get_tensor_name_map(arch, metadata["block_count"])
    if not old_experts:
        tensors = _stacked(tensors)
    meant: dict[str, torch.Tensor] = {}
    for theirs, tensor in moved(tensors, config, split_kv_b):
        others = [each for word, each in (kinds or {}).items() if word in theirs]
        used = "F32" if KEPT.search(theirs) or tensor.ndim < 2 else (others or [kind])[0]
        data, raw = _encoded(tensor, used)
        meant |= unstacked(
            theirs, torch.from_numpy(data if raw is None else gguf.dequantize(data, raw)).float()
        )
        if config["model_type"] == "mixtral":
            theirs = _of_mixtral(theirs)
        known = re.sub("(e_score_correction)_bias|(expert_bias)$", _biased, theirs)
        ours = _named(names, known, old_experts)
        writer.add_tensor(ours, data, raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    if twin:
        twin.mkdir()
        (twin / "config.json").write_text(json.dumps({**config, "dtype": "float32"}))
        save_file(meant, twin / "model.safetensors")
    return path


def _biased(match: re.Match[str]) -> str:
    return f"{match[1] or match[2]}.bias"


_ROOTS = ("general", "tokenizer", "split")


def _add(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        writer.add_array(key, list(value))


def _encoded(tensor: torch.Tensor, kind: str) -> tuple[np.ndarray, Any]:
    number = gguf.GGMLQuantizationType[kind]
    data = tensor.contiguous().numpy()
    if kind in ("F32", "F16"):
        return data.astype({"F32": np.float32, "F16": np.float16}[kind]), None
    try:
        return gguf.quantize(data, number), number
    except NotImplementedError:  # gguf reads this type and does not write it
        return _random(data, kind), number


def _random(data: np.ndarray, kind: str) -> np.ndarray:
    """Blocks that mean numbers as large as those of `data`."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    rng, (*rows, across) = np.random.default_rng(data.size), data.shape
    blocks = rng.integers(0, 256, (data.size // columns, size), np.uint8)
    put_scale(kind.lower(), blocks, 1.0)
    means = BLOCKS[kind.lower()](blocks, columns)
    put_scale(kind.lower(), blocks, float(data.std() / means.std()))
    return blocks.reshape(*rows, across // columns * size)


def _named(names: Any, theirs: str, old_experts: bool) -> str:
    match = _EXPERT.fullmatch(theirs)
    if match and old_experts:
        layer = re.search(r"layers\.(\d+)", theirs)[1]
        role = {"w1": "gate", "w2": "down", "w3": "up"}.get(match[3], match[3].split("_")[0])
        return f"blk.{layer}.ffn_{role}.{match[2]}.weight"
    if re.match(r"rope_(factors|freqs)|blk\.", theirs):
        return theirs
    suffixes = (".weight", ".bias")
    found = names.get_name(theirs, try_suffixes=suffixes)
    if found is None:  # a dense layer or one that looks ahead, which gguf does not know of all
        others = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GLM_DSA, 8)
        found = others.get_name(theirs, try_suffixes=suffixes)
    assert found is not None, theirs
    return found


def _stacked(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    found: dict[str, Any] = {}
    for name, tensor in tensors.items():
        if match := _EXPERT.fullmatch(name):
            found.setdefault(f"{match[1]}.{match[3]}.weight", {})[int(match[2])] = tensor
        else:
            found[name] = tensor
    return {
        name: torch.stack([each[e] for e in range(len(each))]) if isinstance(each, dict) else each
        for name, each in found.items()
    }


def unstacked(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
    """Experts of a stack, each by its name."""
    if ".experts." not in name or tensor.ndim < 3:
        return {name: tensor}
    stem, role = name.split(".experts.")
    return {f"{stem}.experts.{e}.{role}": one.clone() for e, one in enumerate(tensor)}


def _of_mixtral(name: str) -> str:
    """Stacked experts of Mixtral are mapped under Meta's names."""
    if ".experts.w" in name:
        name = name.replace("model.layers", "layers").replace("block_sparse_moe", "feed_forward")
    return name
