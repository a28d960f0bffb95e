"""Writes and reads the bundled tiny model in the format of the Hugging Face hub.

It hides the FP8 block format (E4M3 weights, one FP32 ``weight_scale_inv`` for each 128 x 128 block,
as in DeepSeek-V3), the names that the hub uses for single experts, where transformers holds all
experts of a layer in one tensor, and the small JSON files.
"""

import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tiny_text import BEGIN, BEGIN_ID, CHAT_TEMPLATE, END, END_ID
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DeepseekV3ForCausalLM

BLOCK = 128
E4M3_MAX = 448.0


def hub_config(shape: dict[str, Any]) -> dict[str, Any]:
    """Return the hub's config.json for ``shape``, the sizes that DeepseekV3Config takes."""
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "model_type": "deepseek_v3",
        "torch_dtype": "bfloat16",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": BEGIN_ID,
        "eos_token_id": END_ID,
        "hidden_act": "silu",
        "initializer_range": 0.02,
        "moe_layer_freq": 1,
        "num_nextn_predict_layers": 0,
        "rope_scaling": None,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "use_cache": True,
        **shape,
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
        },
    }


def split_experts(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return ``state`` with fused expert tensors cut into the hub's per-expert matrices.

    ``experts.gate_up_proj`` is [experts, 2 * intermediate, hidden] with the gate first;
    ``experts.down_proj`` is [experts, hidden, intermediate].
    """
    result = {}
    for name, tensor in state.items():
        prefix, _, leaf = name.rpartition(".")
        if not prefix.endswith(".experts"):
            result[name] = tensor
            continue
        for expert, matrix in enumerate(tensor):
            if leaf == "gate_up_proj":
                gate, up = matrix.chunk(2)
                result[f"{prefix}.{expert}.gate_proj.weight"] = gate
                result[f"{prefix}.{expert}.up_proj.weight"] = up
            else:
                result[f"{prefix}.{expert}.{leaf}.weight"] = matrix
    return result


def quantised(name: str) -> bool:
    """Tell whether DeepSeek-V3 keeps the tensor ``name`` in FP8: every linear but the head."""
    return name.endswith("_proj.weight") or name.endswith("kv_a_proj_with_mqa.weight")


def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Return (E4M3 [n, k], FP32 scales [ceil(n/128), ceil(k/128)]) of a float matrix [n, k].

    A block's scale maps its largest magnitude to 448, the largest E4M3 value.
    """
    amax = _blocks(weight.float()).abs().amax(dim=(1, 3))
    scale = torch.where(amax > 0, amax / E4M3_MAX, torch.ones_like(amax))
    scaled = weight.float() / _spread(scale, weight.shape)
    return scaled.clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn), scale


def dequantise(weight: Tensor, scale: Tensor) -> Tensor:
    """Return the FP32 matrix [n, k] that ``quantise`` gave ``weight`` and ``scale`` for."""
    return weight.float() * _spread(scale, weight.shape)


def export(
    out: Path, state: dict[str, Tensor], config: dict[str, Any], tokenizer: Tokenizer
) -> None:
    """Write the checkpoint directory ``out``: beside it first, then in one rename."""
    tensors = {}
    for name, tensor in split_experts(state).items():
        if name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        if quantised(name):
            tensors[name], tensors[f"{name}_scale_inv"] = quantise(tensor)
        elif name.endswith("e_score_correction_bias"):
            tensors[name] = tensor.float().contiguous()
        else:
            tensors[name] = tensor.to(torch.bfloat16).contiguous()
    fresh, old = out.with_name(out.name + ".new"), out.with_name(out.name + ".old")
    for stale in (fresh, old):
        shutil.rmtree(stale, ignore_errors=True)
    fresh.mkdir(parents=True)
    save_file(tensors, fresh / "model.safetensors", metadata={"format": "pt"})
    tokenizer.save(str(fresh / "tokenizer.json"))
    _write_json(fresh / "config.json", config)
    _write_json(
        fresh / "generation_config.json",
        {
            "bos_token_id": BEGIN_ID,
            "eos_token_id": END_ID,
            "do_sample": True,
            "temperature": 0.8,
            "top_p": 0.95,
        },
    )
    _write_json(
        fresh / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": True,
            "add_eos_token": False,
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": config["max_position_embeddings"],
            "chat_template": CHAT_TEMPLATE,
        },
    )
    if out.exists():
        out.rename(old)
    fresh.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def reload(directory: Path) -> Any:
    """Return transformers' model of an exported directory, FP32, with the scales multiplied in."""
    stored = load_file(directory / "model.safetensors")
    plain = {}
    for name, tensor in stored.items():
        scale = stored.get(f"{name}_scale_inv")
        if not name.endswith("_scale_inv"):
            plain[name] = tensor.float() if scale is None else dequantise(tensor, scale)
    config = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    del config["quantization_config"]
    with tempfile.TemporaryDirectory() as folder:
        save_file(plain, Path(folder) / "model.safetensors", metadata={"format": "pt"})
        _write_json(Path(folder) / "config.json", config)
        return DeepseekV3ForCausalLM.from_pretrained(folder, dtype=torch.float32)


def _blocks(matrix: Tensor) -> Tensor:
    """View [n, k] as [n/128, 128, k/128, 128], padded with zeros at ragged edges."""
    n, k = matrix.shape
    padded = torch.nn.functional.pad(matrix, (0, -k % BLOCK, 0, -n % BLOCK))
    return padded.view(padded.shape[0] // BLOCK, BLOCK, padded.shape[1] // BLOCK, BLOCK)


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Repeat each block's scale over the block and cut to ``shape``."""
    full = scale.repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return full[: shape[0], : shape[1]]


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
