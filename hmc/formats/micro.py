"""Floats of 4 bits with a scale for a few columns of a row: MXFP4 (OCP Microscaling Formats v1.0:
an exponent for 32) and NVFP4 (an E4M3 scale for 16, and one number for the whole tensor).
"""

from __future__ import annotations

from dataclasses import replace

from hmc.formats.base import WHOLE, Format, Plane
from hmc.formats.layouts import RECIPROCAL

_HALF = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
E2M1 = (*_HALF, *(-value for value in _HALF))
"""The value of every code."""

MXFP4 = Format(
    name="mxfp4",
    title="MXFP4",
    planes=(
        Plane("codes", ("U8",), ("_packed", "_blocks", ""), bits=4),
        Plane("scale", ("U8", "F8_E8M0"), ("_scale", "_scales", ".scale"), columns=32,
              kept=("F8_E8M0",)),
    ),
    exact_in=("bf16", "f32"),
    about="MXFP4, an exponent for 32 columns",
    values=E2M1,
)  # fmt: skip
MXFP4_I8 = replace(
    MXFP4,
    name="mxfp4-i8",
    planes=(replace(MXFP4.codes, dtypes=("I8",), suffixes=("",)), *MXFP4.scales),
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
    exact_in=("bf16", "f32"),
    about="NVFP4, a scale for 16 columns, all divided by one number",
    values=E2M1,
)
NVFP4_TIMES = replace(
    NVFP4,
    name="nvfp4-times",
    planes=(
        replace(NVFP4.codes, suffixes=("",)),
        NVFP4.scales[0],
        Plane("global", ("F32",), ("_scale_2",), WHOLE, WHOLE),
    ),
    about="NVFP4, a scale for 16 columns, all multiplied by one number",
    read_as="nvfp4",
)
"""As NVIDIA's Model Optimizer stores it."""
