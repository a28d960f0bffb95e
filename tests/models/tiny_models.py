"""The table of tiny models: a configuration a family, as published ones are written but for their
sizes (tiny/<model_type>.json), what transformers needs besides to build it (`TINY`), and its
checkpoints and logits.

Names and layouts are those of published files: transformers writes them (save_pretrained undoes its
own renamings) and reads them back as the oracle; `TINY` says where it would do neither. Sizes are
alike across families where that is honest, since each other one is a kernel to compile.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from checkpoints import VOCAB, draw
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.utils import logging

from hmc.ops import recurrent

Floats = NDArray[np.float32]
FOLDER = Path(__file__).parent / "tiny"
TRACES = Path(__file__).parents[1] / "golden" / "models"
PROMPT = 45


@dataclass(frozen=True)
class Tiny:
    """What the oracle of a family needs: the `model_type` that transformers knows it by, the class
    that loads it, tensors that published checkpoints hold `beside` those that transformers writes,
    by name and shape, names that it writes otherwise than they are published, names of tensors
    whose last two axes it has the other way round, and the part of it that reads text where the
    whole reads nothing without an image. `around` is what stands around the configuration where
    transformers knows it as a `text_config` alone. `f32` are names of tensors in F32,
    `stacks` says that experts are published in stacks, though transformers writes them one by one.
    """

    model_type: str = ""
    loader: Any = AutoModelForCausalLM
    beside: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    published: tuple[tuple[str, str], ...] = ()
    transposed: str = "^$"
    part: str = ""
    around: Mapping[str, Any] | None = None
    stacks: bool = False
    f32: str = (
        r"(e_score_correction_bias|expert_bias|router_bias|block_sparse_moe\.gate\.weight|A_log"
        r"|linear_attn\.norm\.weight|\battention\.dt_bias)$"
    )


_AHEAD = {"eh_proj.weight": (192, 384), "enorm.weight": (192,), "shared_head.norm.weight": (192,)}


def _ahead(layer: int) -> dict[str, tuple[int, ...]]:
    return {f"model.layers.{layer}.{name}": shape for name, shape in _AHEAD.items()}


_VISION = {"width": 32, "layers": 1, "heads": 2, "image_size": 28, "patch_size": 14}

TINY: dict[str, Tiny] = {
    "axk1": Tiny(beside={"model.layers.0.post_mlp_layernorm.weight": (192,)}),
    "cohere2_vision": Tiny(loader=AutoModelForImageTextToText),
    "deepseek_v3": Tiny(beside=_ahead(3)),
    "deepseek_v32": Tiny(beside=_ahead(3)),
    "deepseek_v4": Tiny(
        beside={"mtp.0.e_proj.weight": (192, 192), "mtp.0.enorm.weight": (192,)},
        published=(
            (r"^model\.", ""),
            (r"^embed_tokens\.", "embed."),
            (r"^hc_head\.hc_", "hc_head_"),
            (r"\.attn\.norm\.", ".attn.kv_norm."),
        ),
        f32=r"(hc_\w+|attn_sink|ffn\.gate\.bias|ape|tid2eid)$",
    ),
    "ernie4_5_moe": Tiny(
        beside={
            "model.mtp_emb_norm.0.weight": (192,),
            "model.mtp_linear_proj.0.weight": (192, 384),
        }
    ),
    "gemma4": Tiny(loader=AutoModelForImageTextToText),
    "glm4_moe": Tiny(beside=_ahead(3)),
    "glm4_moe_lite": Tiny(beside=_ahead(3)),
    "glm5_next": Tiny(
        loader=AutoModelForImageTextToText,
        beside={"model.language_model.layers.4.eh_proj.weight": (192, 384)},
        f32=r"(hc_\w+|A_log|dt_bias|conv1d\.weight|e_score_correction_bias)$",
    ),
    "glm_moe_dsa": Tiny(beside=_ahead(4)),
    "glm4v_moe": Tiny(loader=AutoModelForImageTextToText),
    "hy_v3": Tiny(beside=_ahead(3)),
    "hy_v4": Tiny(
        beside={"model.mtp_layers.0.eh_proj.weight": (192, 384)},
        published=(
            (r"\.hc_pre\.(hc_(attn|mlp)_layer)\.", r".\1.hc_pre."),
            (r"\.hc_pre\.hc_head\.", ".hc_head."),
            (r"\.mlp\.(shared_experts\.)?linear_gate\.", r".mlp.\1gate_proj."),
        ),
        f32=r"(hc_\w+|learnable_sink_param|e_score_correction_bias)$",
    ),
    "bailing_hybrid": Tiny(
        beside=_ahead(4),
        published=((r"\.([012])\.attention\.dense\.", r".\1.attention.o_proj."),),
    ),
    "kimi_linear": Tiny(
        f32=r"(A_log|dt_bias)$",
        published=((r"\.block_sparse_moe\.(gate|up|down)_proj\.", r".mlp.\1_proj."),),
    ),
    "kimi_k2": Tiny("deepseek_v3"),
    "kimi_k25": Tiny(
        loader=AutoModelForImageTextToText,
        published=(
            (r"^language_model\.model\.blocks\.", "language_model.model.layers."),
            (r"^model\.mm_projector\.", "mm_projector."),
        ),
    ),
    "llama4": Tiny(loader=AutoModelForImageTextToText, part="language_model"),
    "minimax_m3_vl": Tiny(loader=AutoModelForImageTextToText),
    "mistral3": Tiny(loader=AutoModelForImageTextToText),
    "mistral4": Tiny(loader=AutoModelForImageTextToText),
    "mistral_large4": Tiny(
        loader=AutoModelForImageTextToText, f32=r"(lerope\.alpha|\.gate\.weight)$"
    ),
    "nemotron_h": Tiny(
        beside={
            "mtp.layers.0.norm.weight": (192,),
            "mtp.layers.0.mixer.q_proj.weight": (192, 192),
        }
    ),
    "qwen3_5_moe": Tiny(
        loader=AutoModelForImageTextToText, beside={"mtp.fc.weight": (192, 384)}, stacks=True
    ),
    "qwen3_next": Tiny(beside={"mtp.fc.weight": (192, 384)}),
    "qwen3_vl_moe": Tiny(
        loader=AutoModelForImageTextToText, transposed=r"\.experts\.(gate_up|down)_proj$"
    ),
    "step3p5": Tiny(
        "step3p7", AutoModelForImageTextToText, beside=_ahead(3), around={"vision_config": _VISION}
    ),
    "step3p7": Tiny(loader=AutoModelForImageTextToText, beside=_ahead(3)),
}
"""Families that need more than their configuration."""


def families() -> list[str]:
    """The families of the table."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def keeping_states() -> list[str]:
    """Those of them whose layers keep states a sequence, by their traces."""
    kinds = "|".join(row.name for row in recurrent.OPS)
    kept = re.compile(rf": ({kinds}) @")
    return [name for name in families() if kept.search((TRACES / f"{name}.txt").read_text())]


def write(
    directory: Path, family: str, seed: int = 0, *, stacks: bool = True, **changes: Any
) -> Path:
    """Write a random BF16 checkpoint of `family` to `directory` (made if absent); return it.
    `changes` are of keys of the language model's configuration, which go where they are None;
    without `stacks` experts are one by one where transformers writes them so.
    """
    directory.mkdir(parents=True, exist_ok=True)
    values = json.loads((FOLDER / f"{family}.json").read_text())
    inner = values.get("text_config", values)
    inner.update(changes)
    for key in [key for key, value in changes.items() if value is None]:
        del inner[key]
    tiny = TINY.get(family, Tiny())
    _quiet()
    tiny.loader.from_config(_config(family, values)).save_pretrained(directory)
    shapes = dict(load_file(directory / "model.safetensors"))
    if tiny.stacks and stacks:
        shapes = _stacked(shapes)
    shapes |= {name: torch.empty(shape) for name, shape in tiny.beside.items()}
    generator = torch.Generator().manual_seed(seed)
    tied = values.get("text_config", values).get("tie_word_embeddings", False)
    tensors = {}
    for name in sorted(shapes):
        weight = draw(name, shapes[name], tied, generator)
        if re.search(tiny.transposed, name):
            weight = weight.mT.contiguous()
        for pattern, replacement in tiny.published:
            name = re.sub(pattern, replacement, name)
        tensors[name] = weight if re.search(tiny.f32, name) else weight.to(torch.bfloat16)
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})
    (directory / "config.json").write_text(json.dumps(values))
    return directory


def _stacked(shapes: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of experts by one, put together: gate over up in one stack, down in another."""
    found: dict[str, Tensor] = {}
    stacks: dict[str, list[Tensor]] = {}
    for name, tensor in shapes.items():
        if part := re.fullmatch(r"(.*\.experts)\.\d+\.(gate|up|down)_proj\.weight", name):
            stacks.setdefault(f"{part[1]}.{part[2]}", []).append(tensor)
        else:
            found[name] = tensor
    for name, down in stacks.items():
        path, _, role = name.rpartition(".")
        if role == "down":
            both = (torch.stack(stacks[f"{path}.{each}"]) for each in ("gate", "up"))
            found[f"{path}.gate_up_proj"] = torch.cat((*both,), 1)
            found[f"{path}.down_proj"] = torch.stack(down)
    return found


def prompt(length: int = PROMPT) -> list[int]:
    """Fixed token ids; an end-of-sequence token among them, at which nothing may start anew."""
    ids = [int(x) for x in np.random.default_rng(length).integers(3, VOCAB, length)]
    return [*ids[:17], 1, *ids[18:]] if length > 17 else ids


@cache
def oracle(directory: Path, dtype: torch.dtype) -> Floats:
    """Logits [tokens, vocab] of the prompt by transformers, run in `dtype`."""
    values = json.loads((directory / "config.json").read_text())
    family = values["model_type"]
    tiny = TINY.get(family, Tiny())
    _quiet()
    model, found = tiny.loader.from_pretrained(
        directory, config=_config(family, values), dtype=dtype, output_loading_info=True
    )
    assert not found["missing_keys"] and not found["mismatched_keys"], found
    assert set(found["unexpected_keys"]) <= {*tiny.beside}, found
    with torch.inference_mode():
        text = model.eval().get_submodule(tiny.part)
        logits = text(input_ids=torch.tensor([prompt()]), use_cache=False).logits[0]
    result: Floats = logits.float().numpy()
    return result


def _config(family: str, values: Mapping[str, Any]) -> Any:
    tiny = TINY.get(family, Tiny())
    settings = {key: deepcopy(value) for key, value in values.items() if key != "model_type"}
    if tiny.around is not None:
        settings = {**tiny.around, "text_config": settings}
    return AutoConfig.for_model(tiny.model_type or family, **settings)


def _quiet() -> None:
    """transformers warns of published keys that it has other names for."""
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
