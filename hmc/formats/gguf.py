"""Block formats of GGUF (ggml's block types): structs of codes, scales and minima, one after the
other along a row. What they mean stands in `blocks.py`.
"""

from __future__ import annotations

from hmc.formats.base import Arithmetic, Format, Plane
from hmc.formats.ggml import GGML_TYPES

_EXACT_IN: tuple[Arithmetic, ...] = ("bf16", "whole", "f32")
"""Codes are whole numbers of 8 bits at most."""
_NAMES = "Q4_0 Q4_1 Q5_0 Q5_1 Q8_0 Q2_K Q3_K Q4_K Q5_K Q6_K IQ4_NL IQ4_XS MXFP4"


def _blocks(name: str) -> Format:
    kind = next(each for each in GGML_TYPES.values() if each.name == name)
    plane = Plane("blocks", (kind.dtype,), block=(kind.block, kind.bytes), ragged=False)
    about = f"GGUF {name}, blocks of {kind.block}"
    return Format(kind.dtype.lower(), name, (plane,), _EXACT_IN, about)


GGUF = tuple(map(_blocks, _NAMES.split()))
