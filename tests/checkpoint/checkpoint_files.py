"""Writes safetensors files byte by byte, so that tests can make them lie."""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

BYTES = {
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "U8", "I8"), 1),
    **{"BF16": 2, "F16": 2, "F32": 4, "I32": 4, "I64": 8},
}

FP8_CONFIG = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [128, 128],
}


def int4_config(**weights: Any) -> dict[str, Any]:
    """A compressed-tensors configuration; `weights` overrides fields of its only group."""
    group = {
        "targets": ["Linear"],
        "weights": {
            "num_bits": 4,
            "type": "int",
            "symmetric": True,
            "strategy": "group",
            "group_size": 32,
            "actorder": None,
            **weights,
        },
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "ignore": ["lm_head", "re:.*mlp.gate$"],
        "config_groups": {"group_0": group},
    }


def entries(tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> tuple[dict[str, Any], int]:
    """Honest header entries for name -> (dtype, shape), and the bytes of data they describe."""
    table: dict[str, Any] = {}
    end = 0
    for name, (dtype, shape) in tensors.items():
        begin, end = end, end + prod(shape) * BYTES[dtype]
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [begin, end]}
    return table, end


def write_raw(path: Path, header: bytes, data: bytes = b"", length: int | None = None) -> Path:
    """A shard of exactly these bytes; `length` is what its length field claims."""
    claimed = len(header) if length is None else length
    path.write_bytes(claimed.to_bytes(8, "little") + header + data)
    return path


def write_table(path: Path, table: Any, data_bytes: int) -> Path:
    """A shard with `table` as its header and that much zero data."""
    return write_raw(path, json.dumps(table).encode(), bytes(data_bytes))


def write_shard(path: Path, tensors: Mapping[str, tuple[str, tuple[int, ...]]]) -> Path:
    """An honest shard of zeros."""
    return write_table(path, *entries(tensors))


def write_config(directory: Path, **values: Any) -> Path:
    path = directory / "config.json"
    path.write_text(json.dumps(values))
    return path


def write_index(directory: Path, weight_map: Mapping[str, Any]) -> Path:
    path = directory / "model.safetensors.index.json"
    path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return path
