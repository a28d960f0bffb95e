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
from safetensors.torch import load_file, save_file

from hmc.formats.blocks import BLOCKS, put_scale

ARCHITECTURES = {"qwen3_moe": "qwen3moe", "deepseek_v3": "deepseek2", "mixtral": "llama",
                 "gpt_oss": "gpt-oss"}  # fmt: skip
KEPT = re.compile(r"norm|bias|mlp\.(gate|router)\.weight|block_sparse_moe\.gate\.weight")
"""Tensors that converters keep in F32 whatever the type of the others."""
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
    arch = next(key for key, value in gguf.MODEL_ARCH_NAMES.items() if value == name)
    writer = gguf.GGUFWriter(path, name, split_max_tensors=split)
    metadata = {**_METADATA[config["model_type"]](config), **keys}
    for key, value in metadata.items():
        if value is not None:
            _add(
                writer,
                key if "." in key and key.split(".")[0] in _ROOTS else f"{name}.{key}",
                value,
            )
    names = gguf.get_tensor_name_map(arch, config["num_hidden_layers"])
    if not old_experts:
        tensors = _stacked(tensors)
    meant: dict[str, torch.Tensor] = {}
    for theirs, tensor in _moved(tensors, config, split_kv_b):
        others = [each for word, each in (kinds or {}).items() if word in theirs]
        used = "F32" if KEPT.search(theirs) or tensor.ndim < 2 else (others or [kind])[0]
        data, raw = _encoded(tensor, used)
        meant |= _unstacked(
            theirs, torch.from_numpy(data if raw is None else gguf.dequantize(data, raw)).float()
        )
        if config["model_type"] == "mixtral":
            theirs = _of_mixtral(theirs)
        known = theirs.replace("e_score_correction_bias", "e_score_correction.bias")
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
    found = names.get_name(theirs, try_suffixes=(".weight", ".bias"))
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


def _unstacked(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
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


def _moved(tensors: dict[str, torch.Tensor], config: dict[str, Any], split_kv_b: bool):
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    for name, tensor in tensors.items():
        if config["model_type"] == "gpt_oss":
            yield from _of_gpt_oss(name, tensor)
            continue
        if config["model_type"] == "mixtral" and "q_proj" in name:
            tensor = _permuted(tensor, heads)
        if config["model_type"] == "mixtral" and "k_proj" in name:
            tensor = _permuted(tensor, kv_heads)
        if split_kv_b and "kv_b_proj" in name:
            nope, v_dim = config["qk_nope_head_dim"], config["v_head_dim"]
            both = tensor.reshape(heads, nope + v_dim, -1)
            yield name.replace("kv_b", "k_b"), both[:, :nope].transpose(1, 2)
            yield name.replace("kv_b", "v_b"), both[:, nope:]
            continue
        yield name, tensor


def _of_gpt_oss(name: str, tensor: torch.Tensor):
    """Matrices by rows, gate and up apart."""
    if name.endswith("sinks"):
        name += ".weight"
    if ".experts." in name:
        name = name.replace("_proj_bias", "_proj.bias")
        if not name.endswith(".bias"):
            name, tensor = f"{name}.weight", tensor.transpose(1, 2)
    if "gate_up" not in name:
        yield name, tensor
        return
    for place, role in enumerate(("gate", "up")):
        yield name.replace("gate_up", role), tensor[:, place::2]


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Neighbours for pairs: row i and row i + half of a head side by side."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _common(config: dict[str, Any]) -> dict[str, Any]:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    found = {
        "block_count": config["num_hidden_layers"],
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "rope.freq_base": float(config.get("rope_theta") or rope.get("rope_theta", 10000.0)),
        "expert_used_count": config["num_experts_per_tok"],
        "vocab_size": config["vocab_size"],
        "tokenizer.ggml.eos_token_id": config["eos_token_id"],
    }
    if rope.get("rope_type", rope.get("type")) == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if "mscale_all_dim" in rope:
        found["rope.scaling.yarn_log_multiplier"] = 0.1 * rope["mscale_all_dim"]
    return found


def _qwen3_moe(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "expert_count": config.get("num_experts") or config["num_local_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
    }


def _mixtral(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "expert_count": config["num_local_experts"],
        "rope.dimension_count": config["hidden_size"] // config["num_attention_heads"],
    }


def _deepseek_v3(config: dict[str, Any]) -> dict[str, Any]:
    rotated, nope = config["qk_rope_head_dim"], config["qk_nope_head_dim"]
    found = _common(config) | {
        "attention.head_count_kv": 1,
        "attention.kv_lora_rank": config["kv_lora_rank"],
        "attention.key_length": config["kv_lora_rank"] + rotated,
        "attention.value_length": config["kv_lora_rank"],
        "attention.key_length_mla": nope + rotated,
        "attention.value_length_mla": config["v_head_dim"],
        "rope.dimension_count": rotated,
        "leading_dense_block_count": config["first_k_dense_replace"],
        "expert_count": config["n_routed_experts"],
        "expert_feed_forward_length": config["moe_intermediate_size"],
        "expert_shared_count": config["n_shared_experts"],
        "expert_group_count": config["n_group"],
        "expert_group_used_count": config["topk_group"],
        "expert_weights_scale": config["routed_scaling_factor"],
        "expert_weights_norm": config["norm_topk_prob"],
        "expert_gating_func": 2,
    }
    if config["q_lora_rank"]:
        found["attention.q_lora_rank"] = config["q_lora_rank"]
    return found


def _gpt_oss(config: dict[str, Any]) -> dict[str, Any]:
    return _common(config) | {
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "attention.sliding_window": config["sliding_window"],
        "expert_count": config["num_local_experts"],
        "expert_feed_forward_length": config["intermediate_size"],
    }


_METADATA = {"qwen3_moe": _qwen3_moe, "mixtral": _mixtral, "deepseek_v3": _deepseek_v3,
             "gpt_oss": _gpt_oss}  # fmt: skip
