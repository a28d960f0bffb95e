"""Weights that are what is stored: BF16, FP16, F32."""

from __future__ import annotations

from hmc.formats.base import Format, Plane

BF16 = Format("bf16", "BF16", (Plane("codes", ("BF16",)),), exact_in=("bf16", "f32"))
FP16 = Format("fp16", "FP16", (Plane("codes", ("F16",)),), exact_in=("f32",))
F32 = Format("f32", "F32", (Plane("codes", ("F32",)),), exact_in=("f32",))
I64 = Format(
    "i64", "I64", (Plane("codes", ("I64",), kept=("F32",)),), exact_in=("f32",), read_as="f32"
)
"""Tables of whole numbers, which are F32 in memory."""
