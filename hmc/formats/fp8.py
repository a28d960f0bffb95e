"""FP8 E4M3 codes with a scale for every 128 x 128 of them (DeepSeek-V3's technical report, arXiv
2412.19437, section 3.3.2), for other blocks, a row, a tensor, or 32 of a row (MXFP8).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from hmc.formats.base import (
    WHOLE,
    Described,
    Format,
    Plane,
    Storage,
    minifloats,
    nothing,
)

if TYPE_CHECKING:
    from hmc.checkpoint.config import ModelConfig

BLOCK = 128
"""Rows and columns that share a scale; the only size there are kernels for."""


def is_float8(weights: ModelConfig) -> bool:
    """Whether compressed-tensors describes 8-bit floats."""
    return weights.get_int("num_bits", 8) == 8 and weights.get_str("type", "int") == "float"


def _find(described: Described) -> Storage | None:
    if described.method == "fp8":
        _check_fp8(described.whole)
        return Storage("fp8", ("", "_scale_inv"))
    weights = described.weights
    if described.method != "compressed-tensors" or not is_float8(weights):
        return None
    if described.packing != "float-quantized":
        raise described.whole.unsupported("format", "float-quantized (for FP8)")
    if weights.get_str("strategy", "tensor") != "block":
        raise weights.unsupported("strategy", "block (for FP8)")
    if weights.get_ints("block_structure") != (BLOCK, BLOCK):
        raise weights.unsupported("block_structure", f"[{BLOCK}, {BLOCK}]")
    return Storage("fp8", ("", "_scale"))


def _check_fp8(section: ModelConfig) -> None:
    if section.get_str("fmt", "e4m3") != "e4m3":
        raise section.unsupported("fmt", "e4m3")
    if "weight_block_size" not in section:
        blocks = f"blocks of [{BLOCK}, {BLOCK}]; per-tensor FP8 has no kernels"
        raise section.unsupported("weight_block_size", blocks)
    if section.get_ints("weight_block_size") != (BLOCK, BLOCK):
        raise section.unsupported("weight_block_size", f"[{BLOCK}, {BLOCK}]")
    if section.get_str("activation_scheme", "dynamic") != "dynamic":
        raise section.unsupported("activation_scheme", "dynamic")
    if section.get_str("expert_dtype", "fp8") != "fp8":
        raise section.unsupported("expert_dtype", "fp8")
    if section.get_strs("modules_to_convert"):
        raise section.unsupported("modules_to_convert", "none")


def _fp8(
    name: str, rows: int, columns: int, scale: tuple[str, ...], kept: str, what: str,
    find: Callable[[Described], Storage | None],
) -> Format:  # fmt: skip
    suffixes = ("_scale_inv", "_scale", ".scale")
    return Format(
        name=name,
        title="FP8",
        planes=(
            Plane("codes", ("F8_E4M3",)),
            Plane("scale", scale, suffixes, rows, columns, kept=(kept,)),
        ),
        exact_in=("fp8", "bf16", "f32"),
        about=f"FP8 E4M3, {what} in {{scale}}",
        values=minifloats(4, 3, infinities=False),
        find=find,
    )


_SCALES = ("F32", "BF16", "F8_E8M0", "U8", "F16")

FP8 = _fp8("fp8", BLOCK, BLOCK, _SCALES, "F32", f"{BLOCK}x{BLOCK} scales", _find)
FP8_32 = _fp8("fp8-32", 32, 32, _SCALES, "F32", "32x32 scales", nothing)
FP8_CHANNEL = _fp8("fp8-channel", 1, WHOLE, _SCALES, "F32", "a scale a row", nothing)
FP8_TENSOR = _fp8("fp8-tensor", WHOLE, WHOLE, _SCALES, "F32", "one scale", nothing)
MXFP8 = _fp8("mxfp8", 1, 32, ("U8", "F8_E8M0"), "F8_E8M0", "a scale for 32", nothing)
"""OCP Microscaling Formats (MX) v1.0, section 5: an exponent for 32 of a row."""
