"""What llama.cpp's converters do to tensors on the way to a GGUF file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
from gguf_moves_states import changed, filed

Named = Iterator[tuple[str, torch.Tensor]]


def moved(tensors: dict[str, torch.Tensor], config: dict[str, Any], split_kv_b: bool) -> Named:
    """Tensors by names that gguf maps, or by those of files, as the converter of the family makes
    them of published ones. `split_kv_b` has keys and values of the latent apart.
    """
    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads")
    yield from FACTORS.get(config["model_type"], _no_factors)(config)
    rope = config.get("rope_scaling") or {}
    for which in ("long", "short"):
        if f"{which}_factor" in rope:
            yield f"rope_factors_{which}.weight", torch.tensor(rope[f"{which}_factor"])
    left = LEFT.get(config["model_type"], "^$")
    kept = {name: each for name, each in tensors.items() if not re.search(left, name)}
    for name, tensor in changed(kept, config).items():
        if split_kv_b and "kv_b_proj" in name:
            nope, v_dim = config["qk_nope_head_dim"], config["v_head_dim"]
            both = tensor.reshape(heads, nope + v_dim, -1)
            yield name.replace("kv_b", "k_b"), both[:, :nope].transpose(1, 2)
            yield name.replace("kv_b", "v_b"), both[:, nope:]
            continue
        if config["model_type"] in _OTHERWISE:
            yield from _OTHERWISE[config["model_type"]](name, tensor)
            continue
        if config["model_type"] in PERMUTED and "q_proj" in name:
            tensor = permuted(tensor, heads)
        if config["model_type"] in PERMUTED and "k_proj" in name:
            tensor = permuted(tensor, kv_heads)
        if name.endswith("attention_sink_bias"):
            name += ".weight"
        if "input_linear" in name:  # Granite's
            layer, end = name.split(".")[2], "shexp" if "shared" in name else "exps"
            for role, half in zip(("gate", "up"), tensor.chunk(2, -2), strict=True):
                yield f"blk.{layer}.ffn_{role}_{end}.weight", half
            continue
        yield filed(name, tensor, config)


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


def _of_qwen3_vl_moe(name: str, tensor: torch.Tensor):
    """The text model, its experts by rows, gate and up apart."""
    name = name.replace("language_model.", "")
    if ".experts." not in name:
        yield name, tensor
    elif "down" in name:
        yield f"{name}.weight", tensor.mT
    else:
        for role, half in zip(("gate", "up"), tensor.mT.chunk(2, 1), strict=True):
            yield f"{name.replace('gate_up', role)}.weight", half


def _of_gemma4(name: str, tensor: torch.Tensor):
    """The text model; scales of the router beside the matrices that they are applied with."""
    name = name.replace("language_model.", "")
    layer = name.split(".")[2]
    if name.endswith("router.scale"):
        name = f"blk.{layer}.ffn_gate_inp.scale"
    elif name.endswith("per_expert_scale"):
        name = f"blk.{layer}.ffn_down_exps.scale"
    elif ".experts." in name or name.endswith("layer_scalar"):
        name += ".weight"
    yield name, tensor


def _of_mistral4(name: str, tensor: torch.Tensor):
    yield f"{name}.weight" if ".experts." in name else name, tensor


def _of_step35(name: str, tensor: torch.Tensor):
    """Norms as they are applied."""
    if name.endswith("router_bias"):
        name += ".bias"
    yield name, tensor + 1 if name.endswith("norm.weight") else tensor


def _of_laguna(name: str, tensor: torch.Tensor):
    if name.endswith("e_score_correction_bias"):
        name = f"blk.{name.split('.')[2]}.exp_probs_b.bias"
    yield name, tensor


def _of_sarvam(name: str, tensor: torch.Tensor):
    """Biases of experts without their mean."""
    yield name, tensor - tensor.mean() if name.endswith("expert_bias") else tensor


_OTHERWISE = {"gemma4": _of_gemma4, "gpt_oss": _of_gpt_oss, "laguna": _of_laguna,
              "llama4": _of_qwen3_vl_moe, "mistral4": _of_mistral4,
              "qwen3_vl_moe": _of_qwen3_vl_moe, "sarvam_moe": _of_sarvam,
              "step3p5": _of_step35}  # fmt: skip
LEFT = {"deepseek_v3": r"layers\.3\.", "ernie4_5_moe": "mtp_", "gemma4": "vision|audio",
        "llama4": "vision_model|multi_modal", "qwen3_5_moe": "visual", "qwen3_next": "^mtp",
        "qwen3_vl_moe": "visual",
        "step3p5": "vision_model|vit_large"}  # fmt: skip
"""What converters leave out, or left out for long, by `model_type`."""
PERMUTED = ("mixtral", "granitemoe", "granitemoehybrid", "granitemoeshared")
"""Families whose rows of q and k converters move."""


def permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Neighbours for pairs: row i and row i + half of a head side by side."""
    half = len(rows) // heads // 2
    return rows.reshape(heads, 2, half, *rows.shape[1:]).transpose(1, 2).reshape(rows.shape)


def _no_factors(config: dict[str, Any]) -> Named:
    return iter(())


def _llama3_factors(config: dict[str, Any]) -> Named:
    """Of frequencies of whole heads."""
    rope, base, size = config["rope_scaling"], config["rope_theta"], config["head_dim"]
    base = base[0] if isinstance(base, list) else base
    context = rope["original_max_position_embeddings"]
    found = []
    for pair in range(size // 2):
        wavelength = 2 * math.pi * base ** (2 * pair / size)
        if wavelength < context / rope["high_freq_factor"]:
            found.append(1.0)
        elif wavelength > context / rope["low_freq_factor"]:
            found.append(rope["factor"])
        else:
            between = rope["high_freq_factor"] - rope["low_freq_factor"]
            smooth = (context / wavelength - rope["low_freq_factor"]) / between
            found.append(1 / ((1 - smooth) / rope["factor"] + smooth))
    yield "rope_freqs.weight", torch.tensor(found)


def _proportional_factors(config: dict[str, Any]) -> Named:
    pairs = config["global_head_dim"] // 2
    share = config["rope_parameters"]["full_attention"]["partial_rotary_factor"]
    turned = int(pairs * share)
    yield "rope_freqs.weight", torch.tensor([1.0] * turned + [1e30] * (pairs - turned))


FACTORS = {"gemma4": _proportional_factors, "llama4": _llama3_factors, "step3p5": _llama3_factors}
"""Tensors of factors of frequencies, by `model_type`."""
