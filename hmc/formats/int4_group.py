"""Packed symmetric INT4 of compressed-tensors: codes -8 to 7, stored plus 8, with a scale for every
group of columns of a row.
"""

from __future__ import annotations

from hmc.formats.base import GROUP, Described, Format, Plane, Storage
from hmc.formats.fp8_block import is_float8

GROUP_SIZES = (32, 128)
"""Columns that share one scale in checkpoints that are read."""


def _find(described: Described) -> Storage | None:
    weights = described.weights
    if described.method != "compressed-tensors" or is_float8(weights):
        return None
    if described.packing != "pack-quantized":
        raise described.whole.unsupported("format", "pack-quantized and float-quantized")
    if weights.get_int("num_bits", 8) != 4:
        raise weights.unsupported("num_bits", "4")
    if weights.get_str("type", "int") != "int":
        raise weights.unsupported("type", "int")
    if not weights.get_bool("symmetric", True):
        raise weights.unsupported("symmetric", "true (no zero points)")
    if weights.get_str("strategy", "tensor") != "group":
        raise weights.unsupported("strategy", "group")
    group = weights.get_int("group_size", 0, minimum=-1)
    if group not in GROUP_SIZES:
        raise weights.unsupported("group_size", " and ".join(map(str, GROUP_SIZES)))
    order = weights.values.get("actorder")
    # "static" ("weight" of old) only changed how scales were found; columns stay in order.
    if order not in (None, False, "static", "weight"):
        raise weights.unsupported("actorder", "null, static and weight")
    beside = (("_shape", ("I64", "I32"), (2,)),)
    return Storage("int4", ("_packed", "_scale"), group, beside)


INT4 = Format(
    name="int4",
    title="INT4",
    planes=(
        Plane("codes", ("I32",), ("_packed",), bits=4),
        Plane(
            "scale",
            ("BF16", "F32", "F16"),
            ("_scale",),
            columns=GROUP,
            ragged=False,
            kept=("BF16", "F32"),
        ),
    ),
    exact_in=("bf16", "whole", "f32"),
    about="INT4 symmetric, one {scale} scale per {group} columns",
    values=tuple(float(code - 8) for code in range(16)),
    find=_find,
)
