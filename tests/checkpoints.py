"""Small random checkpoints of every family and format, written by transformers, and its logits for
them.

`write_checkpoint` makes a directory as the hub has them; `oracle_logits` runs transformers on the
dequantised weights. Sizes are small but exercise what real ones do: several routing groups, shared
experts, dense layers, latent queries, YaRN, grouped queries, heads that do not add up to the hidden
size, and widths that leave ragged 128-blocks.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

Quant = Literal["bf16", "fp8", "fp16", "f32", "int4"]

FAMILIES = ("qwen3_moe", "mixtral", "deepseek_v3")
BLOCK, GROUP = 128, 32
VOCAB = 503

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 192,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-5,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_SIZES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 48,
        "intermediate_size": 352,
        "moe_intermediate_size": 160,
        "num_experts": 8,
        "num_experts_per_tok": 3,
        "norm_topk_prob": True,
        "attention_bias": True,
        "mlp_only_layers": [1],
        "rope_theta": 1e6,
    },
    "mixtral": {
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "intermediate_size": 160,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "tie_word_embeddings": True,
    },
    "deepseek_v3": {
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "q_lora_rank": 96,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 32,
        "qk_rope_head_dim": 16,
        "v_head_dim": 48,
        "intermediate_size": 352,
        "moe_intermediate_size": 160,
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "routed_scaling_factor": 2.5,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 8.0,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 0.8,
            "original_max_position_embeddings": 128,
        },
    },
}

_LINEAR = re.compile(r"(proj|proj_with_mqa|\.w[123])\.weight$")
_WIDE = re.compile(r"(\.gate|\.wg|\.router|\.router\.proj|\.router\.layer|lm_head|^head)\.weight$")
"""Routers and the output layer."""
_HASHED = 16
"""Experts of models that choose some by token id."""
_TEXT = """In the beginning was the word, and the word was written down by the people of the
valley; and they said to one another: let us count the stones of the river, the birds of the air
and the days of the year. Naïve café — 你好, мир! — 1234567890
(one, two, three)... "Quoted", isn't it? def f(x): return x + 1
"""
_CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_checkpoint(
    directory: Path,
    family: str,
    quant: Quant,
    *,
    layers: int = 3,
    seed: int = 0,
    shards: int = 1,
    scale_dtype: torch.dtype = torch.float32,
    with_tokenizer: bool = False,
    **overrides: Any,
) -> Path:
    """Write a random checkpoint of `family` to `directory` (made if absent) and return it.

    `overrides` replace keys of the family's configuration. `shards` > 1 writes an index as well.
    `scale_dtype` is that of FP8 block scales, float32 or bfloat16. The same arguments give the same
    tensors.
    """
    values = {**_COMMON, **_SIZES[family], "num_hidden_layers": layers, **overrides}
    config = AutoConfig.for_model(family, **values)
    model = _model(config, torch.float32)
    directory.mkdir(parents=True, exist_ok=True)
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    model.save_pretrained(directory)
    stored = directory / "model.safetensors"
    shapes = load_file(stored)
    stored.unlink()

    generator = torch.Generator().manual_seed(seed)
    tied = bool(config.tie_word_embeddings)
    weights = {name: draw(name, shapes[name], tied, generator) for name in sorted(shapes)}
    tensors, quantization = _FORMATS[quant](weights, scale_dtype)
    _save(directory, tensors, shards)

    settings = json.loads((directory / "config.json").read_text())
    settings["dtype"] = {"fp16": "float16", "f32": "float32"}.get(quant, "bfloat16")
    if quantization:
        settings["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    if with_tokenizer:
        _write_tokenizer(directory)
    return directory


def read_dequantised(directory: Path) -> dict[str, Tensor]:
    """Every weight of a checkpoint under its plain name, in float32: code times scale, rounded
    once.
    """
    stored: dict[str, Tensor] = {}
    for shard in sorted(directory.glob("*.safetensors")):
        stored.update(load_file(shard))
    weights = {}
    for name, tensor in stored.items():
        owner = re.sub("_(scale_inv|scale|shape)$", "", name)
        if owner != name and (owner in stored or f"{owner}_packed" in stored):
            continue
        if name.endswith("_packed"):
            base = name.removesuffix("_packed")
            weights[base] = _unpack_int4(tensor, stored[f"{base}_scale"])
        elif tensor.dtype == torch.float8_e4m3fn:
            weights[name] = tensor.float() * _spread(stored[f"{name}_scale_inv"], tensor.shape)
        else:
            weights[name] = tensor.float()
    return weights


def oracle_logits(
    directory: Path, ids: list[int], dtype: torch.dtype = torch.float32
) -> NDArray[np.float32]:
    """Logits [T, vocab] of a prompt by transformers on the dequantised weights, run in `dtype`."""
    config = AutoConfig.from_pretrained(directory)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = _model(config, dtype)
    for module in model.modules():  # kept in float32 by from_pretrained, whatever the dtype
        bias = getattr(module, "e_score_correction_bias", None)
        if bias is not None:
            module.e_score_correction_bias = bias.float()
    state = _fused_names(read_dequantised(directory))
    if config.tie_word_embeddings:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    with torch.inference_mode():
        logits = model(torch.tensor([ids]), use_cache=False).logits[0]
    result: NDArray[np.float32] = logits.float().numpy()
    return result


def prompt(length: int, seed: int = 1) -> list[int]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
    return ids


def _model(config: Any, dtype: torch.dtype) -> Any:
    """transformers' model of a configuration, randomly initialised."""
    factory: Any = AutoModelForCausalLM
    return factory.from_config(config, dtype=dtype).eval()


def draw(name: str, like: Tensor, tied: bool, generator: torch.Generator) -> Tensor:
    """A random weight: activations stay near 1, router logits spread over about +-2, every part has
    a say.
    """
    if name.endswith("tid2eid"):  # distinct experts for every token
        order = torch.rand(len(like), _HASHED, generator=generator).argsort(-1)
        return order[:, : like.shape[1]].contiguous()
    noise = torch.randn(like.shape, generator=generator)
    if name.endswith("bias"):
        return noise * 0.1
    if name.endswith("A_log"):
        return noise - 3.0  # states last for some twenty tokens
    if name.endswith("ssmax_scaling.s"):
        return 0.2 + 0.02 * noise  # queries of the hundredth token are twice those of the first
    if like.ndim == 1:
        return 1 + 0.1 * noise
    if name.endswith(("embed_tokens.weight", "embed.weight")):
        return noise * (0.5 if tied else 1.0)
    gain = 2.0 if _WIDE.search(name) else 1.0
    return noise * (gain / math.sqrt(like.shape[-1]))


def _plain(dtype: torch.dtype) -> Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]:
    def convert(
        weights: Mapping[str, Tensor], scale_dtype: torch.dtype
    ) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {name: _rounded(name, weight, dtype) for name, weight in weights.items()}, {}

    return convert


def _rounded(name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
    return weight if name.endswith("e_score_correction_bias") else weight.to(dtype)


def _fp8(
    weights: Mapping[str, Tensor], scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """E4M3 codes and one scale a 128x128 block, the largest magnitude of the block at 448."""
    tensors = {}
    for name, weight in weights.items():
        if not _LINEAR.search(name):
            tensors[name] = _rounded(name, weight, torch.bfloat16)
            continue
        source = weight.to(torch.bfloat16).float()
        rows, columns = (-(-size // BLOCK) for size in source.shape)
        blocks = torch.zeros(rows * BLOCK, columns * BLOCK)
        blocks[: source.shape[0], : source.shape[1]] = source
        largest = blocks.abs().reshape(rows, BLOCK, columns, BLOCK).amax((1, 3))
        scale = (largest / 448).to(scale_dtype)
        codes = (source / _spread(scale, source.shape)).clamp(-448, 448)
        tensors[name] = codes.to(torch.float8_e4m3fn)
        tensors[f"{name}_scale_inv"] = scale
    kept = [name for name in weights if name.endswith(".weight") and not _LINEAR.search(name)]
    return tensors, {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "modules_to_not_convert": [name.removesuffix(".weight") for name in ["lm_head", *kept]],
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }


def _spread(scale: Tensor, shape: torch.Size) -> Tensor:
    """Block scales at every element of a matrix."""
    wide = scale.float().repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
    return wide[: shape[0], : shape[1]]


def _int4(
    weights: Mapping[str, Tensor], scale_dtype: torch.dtype
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """compressed-tensors' pack-quantized: symmetric, groups of 32 columns, eight values plus 8 an
    int32.
    """
    tensors = {}
    for name, weight in weights.items():
        if not _LINEAR.search(name):
            tensors[name] = _rounded(name, weight, torch.bfloat16)
            continue
        rows, columns = weight.shape
        groups = weight.to(torch.bfloat16).float().reshape(rows, columns // GROUP, GROUP)
        scale = (groups.abs().amax(-1) / 7.5).to(torch.bfloat16)
        codes = (groups / scale.float()[..., None]).round().clamp(-8, 7) + 8
        nibbles = codes.to(torch.int64).reshape(rows, columns // 8, 8)
        words = (nibbles << torch.arange(0, 32, 4)).sum(-1)
        signed = torch.where(words >= 2**31, words - 2**32, words)
        tensors[f"{name}_packed"] = signed.to(torch.int32)
        tensors[f"{name}_scale"] = scale
        tensors[f"{name}_shape"] = torch.tensor([rows, columns])
    return tensors, {
        "config_groups": {
            "group_0": {
                "input_activations": None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": {
                    "actorder": None,
                    "dynamic": False,
                    "group_size": GROUP,
                    "num_bits": 4,
                    "observer": "minmax",
                    "strategy": "group",
                    "symmetric": True,
                    "type": "int",
                },
            }
        },
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*\\.gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _unpack_int4(packed: Tensor, scale: Tensor) -> Tensor:
    nibbles = (packed[..., None] >> torch.arange(0, 32, 4, dtype=torch.int32)) & 15
    codes = (nibbles - 8).float().reshape(packed.shape[0], scale.shape[1], -1)
    return (codes * scale.float()[..., None]).flatten(1)


_FORMATS: dict[str, Callable[..., tuple[dict[str, Tensor], dict[str, Any]]]] = {
    "bf16": _plain(torch.bfloat16),
    "fp16": _plain(torch.float16),
    "f32": _plain(torch.float32),
    "fp8": _fp8,
    "int4": _int4,
}


def _save(directory: Path, tensors: dict[str, Tensor], shards: int) -> None:
    """One file, or several and their index; names go round, so that layers straddle shards."""
    parts: list[dict[str, Tensor]] = [{} for _ in range(shards)]
    for index, name in enumerate(sorted(tensors)):
        parts[index % shards][name] = tensors[name].contiguous()
    if shards == 1:
        save_file(parts[0], directory / "model.safetensors", {"format": "pt"})
        return
    where = {}
    for index, part in enumerate(parts):
        file = f"model-{index + 1:05}-of-{shards:05}.safetensors"
        save_file(part, directory / file, {"format": "pt"})
        where.update(dict.fromkeys(part, file))
    size = sum(tensor.nbytes for tensor in tensors.values())
    index_text = json.dumps({"metadata": {"total_size": size}, "weight_map": where}, indent=2)
    (directory / "model.safetensors.index.json").write_text(index_text)


def _fused_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hub names -> those of transformers' modules, which stack the experts of a layer."""
    state: dict[str, Tensor] = {}
    experts: dict[str, dict[int, dict[str, Tensor]]] = {}
    roles = {"w1": "gate", "w3": "up", "w2": "down"}
    for name, weight in weights.items():
        plain = name.replace(".block_sparse_moe.", ".mlp.")
        found = re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", plain)
        if not found:
            state[plain] = weight
            continue
        role = roles.get(found[3], found[3].removesuffix("_proj"))
        experts.setdefault(found[1], {}).setdefault(int(found[2]), {})[role] = weight
    for path, parts in experts.items():
        each = [parts[index] for index in range(len(parts))]
        state[f"{path}.gate_up_proj"] = torch.stack(
            [torch.cat((part["gate"], part["up"])) for part in each]
        )
        state[f"{path}.down_proj"] = torch.stack([part["down"] for part in each])
    return state


def _write_tokenizer(directory: Path) -> None:
    """A byte-level BPE of at most `VOCAB` tokens with a chat template; ids 0 and 1 begin and end a
    text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB,
        special_tokens=["<s>", "</s>", "<|user|>", "<|assistant|>", "<|system|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([_TEXT] * 4, trainer)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": _CHAT_TEMPLATE,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
