"""Floats of 4 bits with a scale for a few columns of a row: MXFP4 (OCP Microscaling Formats v1.0:
an exponent for 32) and NVFP4 (an E4M3 scale for 16, and one number for the whole tensor).
"""

from __future__ import annotations

from dataclasses import replace

from hmc.formats.base import WHOLE, Format, Plane
from hmc.formats.dialects import any_of, by_method, compressed_tensors, fine_grained, modelopt
from hmc.formats.layouts import RECIPROCAL

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF, *(-value for value in _HALF))
"""The value of every code."""

MXFP4 = Format(
    name="mxfp4",
    title="MXFP4",
    planes=(
        Plane("codes", ("U8",), ("_packed", "_blocks", ""), bits=4),
        Plane("scale", ("U8", "F8_E8M0"), ("_scale", "_scales", ".scale", "_scale_inv"),
              columns=32, kept=("F8_E8M0",)),
    ),
    exact_in=("bf16", "whole", "f32"),
    about="MXFP4, an exponent for 32 columns",
    values=E2M1,
    find=any_of(
        by_method("mxfp4", ("_blocks", "_scales"), "mxfp4"),
        compressed_tensors("mxfp4", ("_packed", "_scale"), ("mxfp4-pack-quantized",), ("float", 4),
                           strategies=("group",), group=32),
        modelopt("mxfp4", ("", "_scale"), ("MXFP4", "W4A8_MXFP4_FP8"), 32),
    ),
)  # fmt: skip
MXFP4_I8 = replace(
    MXFP4,
    name="mxfp4-i8",
    planes=(replace(MXFP4.codes, dtypes=("I8",), suffixes=("",)), *MXFP4.scales),
    find=fine_grained("mxfp4-i8", ("", ".scale"), experts="fp4"),
    read_as="mxfp4",
)
"""As DeepSeek-V4 stores experts."""
_GLOBAL = Plane("global", ("F32",), ("_global_scale",), WHOLE, WHOLE,
                layout=RECIPROCAL)  # fmt: skip
NVFP4 = Format(
    name="nvfp4",
    title="NVFP4",
    planes=(
        Plane("codes", ("U8",), ("_packed",), bits=4),
        Plane("scale", ("F8_E4M3",), ("_scale",), columns=16),
        _GLOBAL,
    ),
    exact_in=("bf16", "whole", "f32"),
    about="NVFP4, a scale for 16 columns, all divided by one number",
    values=E2M1,
    find=compressed_tensors(
        "nvfp4", ("_packed", "_scale", "_global_scale"), ("nvfp4-pack-quantized",), ("float", 4),
        strategies=("tensor_group", "group"), group=16,
    ),
)  # fmt: skip
NVFP4_TIMES = replace(
    NVFP4,
    name="nvfp4-times",
    planes=(
        replace(NVFP4.codes, suffixes=("",)),
        NVFP4.scales[0],
        Plane("global", ("F32",), ("_scale_2",), WHOLE, WHOLE),
    ),
    about="NVFP4, a scale for 16 columns, all multiplied by one number",
    find=modelopt("nvfp4-times", ("", "_scale", "_scale_2"),
                  ("NVFP4", "W4A16_NVFP4", "W4A8_NVFP4_FP8"), 16),
    read_as="nvfp4",
)  # fmt: skip
"""As NVIDIA's Model Optimizer stores it."""
