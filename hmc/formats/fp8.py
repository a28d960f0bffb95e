"""FP8 E4M3 codes with a scale for every 128 x 128 of them (DeepSeek-V3's technical report, arXiv
2412.19437, section 3.3.2), for other blocks, a row, a tensor, or 32 of a row (MXFP8).
"""

from __future__ import annotations

from hmc.formats.base import GROUP, WHOLE, Format, Plane, minifloats
from hmc.formats.dialects import (
    Find,
    any_of,
    blocked,
    by_method,
    compressed_tensors,
    fine_grained,
    modelopt,
)

BLOCK = 128
"""Rows and columns that share a scale in most checkpoints."""

_SCALES = ("F32", "BF16", "F8_E8M0", "U8", "F16")
_FLOAT = ("float-quantized", "naive-quantized")


def _fp8(
    name: str, rows: int, columns: int, what: str, find: Find,
    scale: tuple[str, ...] = _SCALES, kept: str = "F32",
) -> Format:  # fmt: skip
    suffixes = ("_scale_inv", "_scale", ".scale", ".qscale_weight")
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


def _find(
    name: str, block: tuple[int, ...], strategy: str, *algorithms: str,
    formats: tuple[str, ...] = _FLOAT, group: int = 0,
) -> Find:  # fmt: skip
    """Scales are `weight_scale_inv` for transformers, `weight_scale` for the others, `scale` beside
    the weight for DeepSeek-V4, `qscale_weight` for Mistral Large 4.
    """
    blocks = block if strategy == "block" else ()
    return any_of(
        fine_grained(name, ("", "_scale_inv"), block),
        compressed_tensors(name, ("", "_scale"), formats, ("float", 8), strategies=(strategy,),
                           block=blocks, group=group),
        modelopt(name, ("", "_scale"), algorithms),
    )  # fmt: skip


FP8 = _fp8("fp8", BLOCK, BLOCK, f"{BLOCK}x{BLOCK} scales",
           _find("fp8", (BLOCK, BLOCK), "block", "FP8_PB_WO"))  # fmt: skip
FP8_32 = _fp8("fp8-32", 32, 32, "32x32 scales", _find("fp8-32", (32, 32), "block"))
FP8_TENSOR = _fp8("fp8-tensor", WHOLE, WHOLE, "one scale",
                  _find("fp8-tensor", (), "tensor", "FP8"))  # fmt: skip
FP8_CHANNEL = _fp8(
    "fp8-channel", 1, WHOLE, "a scale a row",
    any_of(_find("fp8-channel", (), "channel", "FP8_PER_CHANNEL_PER_TOKEN"),
           by_method("fp8-channel", ("", "_scale"), "fbgemm_fp8")),
)  # fmt: skip
MXFP8 = _fp8(
    "mxfp8", 1, 32, "a scale for 32",
    _find("mxfp8", (1, 32), "group", "MXFP8", formats=("mxfp8-quantized", *_FLOAT), group=32),
    ("U8", "F8_E8M0"), "F8_E8M0",
)  # fmt: skip
"""OCP Microscaling Formats (MX) v1.0, section 5: an exponent for 32 of a row."""
FP8_GROUP = _fp8("fp8-group", 1, GROUP, "a scale for {group}", blocked("fp8-group", 1, _FLOAT))
FP8_ROWS = tuple(
    _fp8(f"fp8-rows{rows}", rows, GROUP, f"{rows}x{{group}} scales",
         blocked(f"fp8-rows{rows}", rows, _FLOAT, ((BLOCK, BLOCK), (32, 32))))
    for rows in (2, 4, 8, 16, 32, 64, 128, 256)
)  # fmt: skip
"""Blocks of so many rows, as wide as the configuration says."""
