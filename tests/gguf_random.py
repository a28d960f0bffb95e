"""Writes a GGUF file of a model's shapes with random blocks, to measure beside other programs:

    PYTHONPATH=.:tests python -m gguf_random CONFIG FILE [--layers N] [--type Q8_0|Q4_K_M|MXFP4]

CONFIG is a config.json of a family whose experts are named as Qwen3's or gpt-oss's are. Q4_K_M has,
as llama.cpp's mix of that name, Q6_K for the head and for v and down of every second layer; MXFP4
is that of the experts alone, the rest being Q8_0.
"""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import gguf
import numpy as np
from gguf_files import KEPT, _add
from gguf_metadata import ARCHITECTURES, METADATA

from hmc.checkpoint.config import load_config
from hmc.formats.blocks import BLOCKS, put_scale
from hmc.graph import WeightSpec
from hmc.models import load, weight_specs

_PIECE = 4096  # blocks drawn; a tensor repeats them
_SPREAD = 0.02  # of weights, as an initialised model has them


def blocks_of(kind: str, shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Blocks of `shape` weights with a standard deviation of `_SPREAD`, as bytes by rows."""
    columns, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    name = {"MXFP4": "ggml_mxfp4"}.get(kind, kind.lower())
    piece = rng.integers(0, 256, (_PIECE, size), np.uint8)
    put_scale(name, piece, 1.0)
    put_scale(name, piece, _SPREAD / float(BLOCKS[name](piece, columns).std()))
    count = int(np.prod(shape)) // columns
    whole = np.resize(piece, (count, size))
    return whole.reshape(*shape[:-1], shape[-1] // columns * size)


def type_of(mix: str, spec: WeightSpec, layer: int) -> str:
    """Of a matrix, by the mix."""
    if mix == "MXFP4":
        return "MXFP4" if spec.experts else "Q8_0"
    if mix != "Q4_K_M":
        return mix
    richer = "lm_head" in spec.name or (
        layer % 2 == 0 and (spec.role == "down" or "v_proj" in spec.name)
    )
    return "Q6_K" if richer else "Q4_K"


def name_of(names: gguf.TensorNameMap, spec: WeightSpec, layer: int) -> str:
    """Of a tensor, as converters call it."""
    if spec.experts:
        role, end = spec.role.removesuffix("_bias"), spec.role.partition("_")[2] or "weight"
        return f"blk.{layer}.ffn_{role}_exps.{end}"
    name = f"{spec.name}.weight" if spec.name.endswith("sinks") else spec.name
    return str(names.get_name(name, try_suffixes=(".weight", ".bias")))


def write(path: Path, config_path: Path, layers: int, mix: str) -> None:
    """The file."""
    config = load_config(config_path)
    if layers:
        config = config.with_text(num_hidden_layers=layers)
    values = dict(config.values)
    family = config.require_str("model_type")
    arch = next(k for k, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[family])
    writer = gguf.GGUFWriter(path, ARCHITECTURES[family])
    for key, value in METADATA[family](values).items():
        known = key.startswith("tokenizer")
        _add(writer, key if known else f"{ARCHITECTURES[family]}.{key}", value)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(arch, values["num_hidden_layers"])
    rng = np.random.default_rng(1)
    for spec in weight_specs(load(config).module).values():
        layer = int(re.search(r"layers\.(\d+)", spec.name + " layers.0")[1])
        shape = (spec.experts, *spec.shape) if spec.experts else spec.shape
        name = name_of(names, spec, layer)
        if (not spec.linear and spec.role != "table") or KEPT.search(spec.name):
            plain = rng.standard_normal(shape, np.float32) * _SPREAD + ("norm" in spec.name)
            writer.add_tensor(name, plain.astype(np.float32))
            continue
        kind = type_of(mix, spec, layer)
        raw = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(name, blocks_of(kind, shape, rng), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("file", type=Path)
    parser.add_argument("--layers", type=int, default=0, help="[as the configuration has them]")
    parser.add_argument("--type", default="Q8_0", choices=["Q8_0", "Q4_K_M", "MXFP4", "Q4_0"])
    asked = parser.parse_args()
    write(asked.file, asked.config, asked.layers, asked.type)


if __name__ == "__main__":
    main()
