"""Models for the GPU check: published shapes cut in depth, the same families much reduced, and
small random checkpoints of these; hides configurations.

Checkpoints are written from the models' own lists of parameters, so nothing but PyTorch is needed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from hmc import models
from hmc.bench.model import total_bytes
from hmc.checkpoint import load_config
from hmc.compiler import compile as compile_plan
from hmc.errors import UsageError
from hmc.graph import WeightSpec
from hmc.machine.detect import available_bytes
from hmc.machine.model import Machine

QWEN, MIXTRAL, DEEPSEEK = "qwen3-30b-a3b", "mixtral-8x7b", "deepseek-v3"
FAMILIES = (QWEN, MIXTRAL, DEEPSEEK)
FORMATS = ("bf16", "fp8")
CONFIGS = Path(__file__).resolve().parents[2] / "examples" / "configs"
"""Published configurations, as the repository has them."""

_BLOCK = 128
_LARGEST = 448.0  # of E4M3
_COMMON = {
    "hidden_size": 256,
    "vocab_size": 24576,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 48,
    "max_position_embeddings": 4096,
}
_REDUCED: dict[str, dict[str, Any]] = {
    QWEN: {"intermediate_size": 320, "moe_intermediate_size": 160, "num_experts": 16},
    MIXTRAL: {"intermediate_size": 256, "num_local_experts": 8},
    DEEPSEEK: {
        "num_key_value_heads": 6,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "intermediate_size": 320,
        "moe_intermediate_size": 128,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "first_k_dense_replace": 1,
    },
}
"""Sizes that leave ragged blocks in some matrices and whole ones in others."""


def reduced(folder: Path, name: str) -> Path:
    """A directory with the configuration of a small model of the same family."""
    values = _published(name) | _COMMON | _REDUCED[name]
    return _written(folder / f"{name}-reduced", values)


def cut(folder: Path, name: str, layers: int, machine: Machine, largest: float) -> Path:
    """A directory with a published configuration, cut to at most `layers` layers (one of them
    dense where the first ones are) so that its weights take at most `largest` bytes, and a third of
    the memory that is free; two layers at least.
    """
    values = _published(name)
    if "first_k_dense_replace" in values:
        values["first_k_dense_replace"] = 1
    room = min(largest, available_bytes() / 3)
    host = machine.model_copy(update={"gpus": ()})
    for depth in range(layers, 1, -1):
        directory = _written(folder / name, values | {"num_hidden_layers": depth})
        plan = compile_plan(directory, machine=host, dummy_weights=True, max_context=_BLOCK)
        if total_bytes(plan) <= room or depth == 2:
            break
    return directory


def write_checkpoint(folder: Path, name: str, quant: str, seed: int) -> Path:
    """A random checkpoint of the reduced model in a format of `FORMATS`; activations stay near 1,
    and routers choose widely. The same seed gives the same tensors.
    """
    values = _published(name) | _COMMON | _REDUCED[name]
    values.pop("quantization_config", None)
    values["torch_dtype"] = "bfloat16"
    directory = folder / f"{name}-{quant}"
    specs = models.weight_specs(models.load(load_config(_written(directory, values))).module)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    kept: list[str] = []
    for spec in specs.values():
        low = quant == "fp8" and spec.linear and not _is_head(spec.name)
        if spec.linear and not low:
            kept.append(spec.name.removesuffix(".weight"))
        for expert in range(max(1, spec.experts)):
            full = spec.name.replace("{e}", str(expert))
            drawn = _draw(spec, generator)
            if low:
                tensors[full], tensors[f"{full}_scale_inv"] = quantised(drawn)
            else:
                tensors[full] = drawn if full.endswith("bias") else drawn.to(torch.bfloat16)
    if quant == "fp8":
        values["quantization_config"] = {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "activation_scheme": "dynamic",
            "weight_block_size": [_BLOCK, _BLOCK],
            "modules_to_not_convert": kept,
        }
    save_file(tensors, str(directory / "model.safetensors"))
    return _written(directory, values)


def quantised(weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """f32 [N, K] as E4M3 codes [N, K] and f32 scales [ceil(N/128), ceil(K/128)]; a block's largest
    magnitude becomes E4M3's."""
    rows, columns = (-(-size // _BLOCK) for size in weights.shape)
    padded = weights.new_zeros(rows * _BLOCK, columns * _BLOCK)
    padded[: weights.shape[0], : weights.shape[1]] = weights
    blocks = padded.view(rows, _BLOCK, columns, _BLOCK)
    scale = (blocks.abs().amax((1, 3)) / _LARGEST).clamp_(min=1e-12)
    codes = (blocks / scale[:, None, :, None]).clamp_(-_LARGEST, _LARGEST).view(padded.shape)
    exact = codes[: weights.shape[0], : weights.shape[1]].contiguous()
    return exact.to(torch.float8_e4m3fn), scale


def _draw(spec: WeightSpec, generator: torch.Generator) -> torch.Tensor:
    noise = torch.randn(spec.shape, generator=generator)
    if spec.name.endswith("bias"):
        return noise * 0.1
    if len(spec.shape) == 1:
        return 1 + 0.1 * noise
    if spec.role == "table":
        return noise
    return noise * ((2.0 if _is_head(spec.name) else 1.0) / math.sqrt(spec.shape[1]))


def _is_head(name: str) -> bool:
    """Whether a linear weight is a router or the output, which stay unquantised."""
    return name.endswith((".gate.weight", "lm_head.weight"))


def _published(name: str) -> dict[str, Any]:
    path = CONFIGS / name / "config.json"
    try:
        values: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise UsageError(
            f"{path}: {error.strerror}; the GPU check runs in a checkout of the repository"
        ) from error
    return values


def _written(directory: Path, values: Mapping[str, Any]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(values, indent=1) + "\n")
    return directory
