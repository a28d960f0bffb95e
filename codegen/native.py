"""In which arithmetic a tier multiplies a weight format, and which formats have native decoders.

A format takes the best arithmetic that the tier has, in which its products are exact (the format's
row says so) and for which somebody wrote a decoder. Where there is none, it is multiplied as f32 by
the decoder that is made from its planes (formats/made.py): any table of codes of 2, 4 or 8 bits or
any plain float, less zeros and times scales of any blocks; and blocks of GGUF.

    arithmetic   tiers                decode: a few tokens        many tokens
    bf16         those with pairs     byte and word tables        the same, after a transpose
    whole        the others           16-bit whole numbers        the same
    f32          all                  shifts in place, or none    shifts in place, or none
    f32, made    all                  a table look-up a code      the same, then a transpose
"""

from __future__ import annotations

from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec
from hmc.formats import format_of
from hmc.formats.base import Arithmetic

NATIVE: dict[Arithmetic, frozenset[str]] = {
    "bf16": frozenset(
        {"fp8", "bf16", "int4", "q8_0", "q4_0", "ggml_mxfp4", "q4_k", "q5_k", "q6_k", "iq4_xs"}
    ),
    "whole": frozenset({"int4"}),
    "f32": frozenset({"fp8", "bf16", "fp16", "f32"}),
}
"""Formats with a decoder of their own, by arithmetic."""

_UNCHECKED = frozenset({("fp8", "f32")})
"""Decoders that take NaN codes for numbers (formats/unpack.py)."""

_GROUPS = {"int4": (32, 64, 128)}
"""Columns that share a scale, as far as native decoders know them; others have made ones."""

_CODES = (2, 4, 8)

NUMBERS = frozenset({"F32", "F16", "BF16", "F8_E8M0", "F8_E4M3", "F8_E5M2"})
"""Dtypes of scales and zeros that kernels read."""


def arithmetic(isa: str, weight: str) -> Arithmetic:
    """How tier `isa` multiplies weights of a format by activations."""
    best: Arithmetic = "bf16" if TIERS[isa].pair_dot else "whole"
    return best if best in format_of(weight).exact_in and weight in NATIVE[best] else "f32"


def has_native(isa: str, weight: str) -> bool:
    """Whether the tier has a decoder of the format's own."""
    return weight in NATIVE[arithmetic(isa, weight)]


def is_native(spec: KernelSpec) -> bool:
    """Whether the weights of `spec` are read by a decoder of the format's own."""
    groups = _GROUPS.get(spec.weight)
    known = groups is None or spec.get("group") in groups
    return known and has_native(spec.isa, spec.weight)


def reads_planes(spec: KernelSpec) -> bool:
    """Whether that decoder takes codes and scales from planes, and not from blocks."""
    return is_native(spec) and not format_of(spec.weight).codes.block[1]


def takes_nan(isa: str, weight: str) -> bool:
    """Whether the kernels of a format take NaN codes for numbers on tier `isa`, so that weights
    must be checked for them; all others give NaN.
    """
    return (weight, arithmetic(isa, weight)) in _UNCHECKED


def problem_of(spec: KernelSpec) -> str:
    """Why no kernel can read the weights of `spec`, "" where one can."""
    row = format_of(spec.weight)
    if row.grouped and spec.get("group") < 1:
        return f"reads {row.name} in groups, not of {spec.get('group')}"
    if row.values and not row.codes.block[1] and row.code_bits not in _CODES:
        return f"cannot read {row.name}: decoders are made for codes of 2, 4 and 8 bits"
    for plane in row.scales:
        kept = spec.get(f"{plane.name}_dtype")
        if not 0 <= kept < max(1, len(plane.kept)):
            return f"reads {row.name} with {plane.name} in {' or '.join(plane.kept)}, not {kept}"
        odd = {plane.in_memory(dtype) for dtype in plane.dtypes} - NUMBERS
        if odd and plane.kind != "order":
            return f"cannot read {row.name}: {plane.name} in {' or '.join(sorted(odd))}"
    return ""
