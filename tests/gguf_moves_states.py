"""What llama.cpp's converters do to tensors of layers with states."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]
Config = dict[str, Any]


def changed(tensors: Tensors, config: Config) -> Tensors:
    """Tensors by published names with the values that files have."""
    change = _CHANGES.get(config["model_type"])
    if change is None:
        return tensors
    return {
        name: -torch.exp(found) if name.endswith("A_log") else found
        for theirs, tensor in tensors.items()
        for name, found in change(theirs, tensor.float(), config)
    }


def filed(name: str, tensor: torch.Tensor, config: Config) -> tuple[str, torch.Tensor]:
    """By a name that gguf maps, and in a file's shape."""
    if config["model_type"] not in _CHANGES:
        return name, tensor
    for pattern, target in _CALLED:
        name = re.sub(pattern, target, name)
    if "conv" in name and tensor.ndim == 3:
        tensor = tensor.squeeze(1)
        if "self_attn" in name:  # Kimi's
            tensor = tensor[None, :, None]
    if re.search(r"(mamba|mixer)\.(A_log|D)$", name) and tensor.ndim == 1:
        tensor = tensor[:, None]
    if re.search(r"(mamba|mixer)\.norm\.", name):
        tensor = tensor.reshape(config.get("n_groups") or config["mamba_n_groups"], -1)
    return name, tensor


_CALLED = (
    (r"\.language_model\.", "."),
    (r"(?<!mixer)\.dt_bias$", ".dt_proj.bias"),
    (r"(?<=mixer)\.dt_bias$", ".dt.bias"),
    (r"^backbone\.(layers\.\d+)\.mixer\.experts\.", r"model.\1.mlp.experts."),
    (r"^model\.(layers\.\d+\.feed_forward\.experts\.w)", r"\1"),
)

Named = Iterator[tuple[str, torch.Tensor]]


def _as_they_are(name: str, tensor: torch.Tensor, config: Config) -> Named:
    yield name, tensor


def _with_norms(name: str, tensor: torch.Tensor) -> tuple[str, torch.Tensor]:
    """Norms as they are applied."""
    hidden = name.endswith("norm.weight") and "linear_attn.norm" not in name
    return name, tensor + 1 if hidden else tensor


def _of_qwen3_next(name: str, tensor: torch.Tensor, config: Config) -> Named:
    """q, k and v in one tensor, z in another, each by head."""
    if "in_proj_qkvz" not in name:
        yield _with_norms(name, tensor)
        return
    heads, key = config["linear_num_key_heads"], config["linear_key_head_dim"]
    values = config["linear_num_value_heads"] // heads * config["linear_value_head_dim"]
    parts = tensor.reshape(heads, -1, tensor.shape[-1]).split([key, key, values, values], 1)
    *qkv, z = (each.flatten(0, 1) for each in parts)
    yield name.replace("qkvz", "qkv"), torch.cat(qkv)
    yield name.replace("qkvz", "z"), z


def _of_qwen3_5(name: str, tensor: torch.Tensor, config: Config) -> Named:
    """Heads of values that share keys lie apart; experts by role."""
    if name.startswith("mtp."):
        layer = config["num_hidden_layers"]
        yield f"model.language_model.layers.{layer}.eh_proj.weight", tensor
    elif ".experts." in name:
        roles = ("down",) if "down" in name else ("gate", "up")
        for role, part in zip(roles, tensor.chunk(len(roles), 1), strict=True):
            yield f"{name.rpartition('.')[0]}.{role}_proj.weight", part
    elif "linear_attn." in name and "linear_attn.norm" not in name:
        yield name, _apart(name, tensor, config)
    else:
        yield _with_norms(name, tensor)


def _apart(name: str, tensor: torch.Tensor, config: Config) -> torch.Tensor:
    count = config["linear_num_key_heads"]
    keys = 2 * count * config["linear_key_head_dim"]
    if "out_proj" in name:
        return _tiled(tensor.T, count, config).T
    if "qkv" in name or "conv1d" in name:
        return torch.cat([tensor[:keys], _tiled(tensor[keys:], count, config)])
    return _tiled(tensor, count, config)


def _tiled(rows: torch.Tensor, count: int, config: Config) -> torch.Tensor:
    """Heads of keys, and of each its heads of values -> the other way round."""
    served = config["linear_num_value_heads"] // count
    return rows.reshape(count, served, -1, *rows.shape[1:]).transpose(0, 1).reshape(rows.shape)


def _of_nemotron(name: str, tensor: torch.Tensor, config: Config) -> Named:
    """The layer that looks ahead is the last."""
    yield name.replace("mtp.layers.0", f"backbone.layers.{config['num_hidden_layers']}"), tensor


_CHANGES = {"granitemoehybrid": _as_they_are, "jamba": _as_they_are, "kimi_linear": _as_they_are,
            "lfm2_moe": _as_they_are, "nemotron_h": _of_nemotron, "qwen3_5_moe": _of_qwen3_5,
            "qwen3_next": _of_qwen3_next}  # fmt: skip
