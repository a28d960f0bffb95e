"""In which arithmetic a tier multiplies a weight format, and which formats have native decoders.

A format takes the best arithmetic that the tier has, in which its products are exact (the format's
row says so) and for which somebody wrote a decoder. Where there is none, it is multiplied as f32 by
the decoder that is made from its planes (formats/weights.py): any table of codes of 2, 4 or 8 bits,
or any plain float, times one plane of scales.

    arithmetic   tiers                decode: a few tokens        many tokens
    bf16         those with pairs     byte and word tables        the same, after a transpose
    whole        the others           16-bit whole numbers        the same
    f32          all                  shifts in place, or none    shifts in place, or none
    f32, made    all                  a table look-up a code      the same, then a transpose
"""

from __future__ import annotations

from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec
from hmc.formats import GROUP, WHOLE, Format, format_of
from hmc.formats.base import Arithmetic

NATIVE: dict[Arithmetic, frozenset[str]] = {
    "bf16": frozenset({"fp8", "bf16", "int4"}),
    "whole": frozenset({"int4"}),
    "f32": frozenset({"fp8", "bf16", "fp16", "f32"}),
}
"""Formats with a decoder of their own, by arithmetic."""

_UNCHECKED = frozenset({("fp8", "f32")})
"""Decoders that take NaN codes for numbers (formats/unpack.py)."""

_GROUPS = {"int4": (32, 64, 128)}
"""Columns that share a scale, as far as native decoders know them."""

_CODES = (2, 4, 8)


def arithmetic(isa: str, weight: str) -> Arithmetic:
    """How tier `isa` multiplies weights of a format by activations."""
    best: Arithmetic = "bf16" if TIERS[isa].pair_dot else "whole"
    return best if best in format_of(weight).exact_in and weight in NATIVE[best] else "f32"


def is_native(isa: str, weight: str) -> bool:
    """Whether the tier has a decoder of the format's own."""
    return weight in NATIVE[arithmetic(isa, weight)]


def takes_nan(isa: str, weight: str) -> bool:
    """Whether the kernels of a format take NaN codes for numbers on tier `isa`, so that weights
    must be checked for them; all others give NaN.
    """
    return (weight, arithmetic(isa, weight)) in _UNCHECKED


def problem_of(spec: KernelSpec) -> str:
    """Why no kernel can read the weights of `spec`, "" where one can."""
    row = format_of(spec.weight)
    for plane in row.scales:
        columns = spec.get("group") if plane.columns == GROUP else plane.columns
        groups, kept = _GROUPS.get(row.name, ()), spec.get(f"{plane.name}_dtype")
        if (groups and columns not in groups) or columns < 0:
            known = f" of {', '.join(map(str, groups))}" if groups else ""
            return f"reads {row.name} in groups{known}, not of {columns}"
        if not 0 <= kept < max(1, len(plane.kept)):
            return f"reads {row.name} with {plane.name} in {' or '.join(plane.kept)}, not {kept}"
    return "" if is_native(spec.isa, row.name) else _made(row, spec)


def _made(row: Format, spec: KernelSpec) -> str:
    """Why no decoder can be made from the planes of a format."""
    if len(row.planes) > 2:
        return f"cannot read {row.name}: decoders are made for one plane of scales"
    if row.codes.block[1]:
        return f"cannot read {row.name}: no decoder is made of blocks"
    if row.values and row.code_bits not in _CODES:
        return f"cannot read {row.name}: decoders are made for codes of 2, 4 and 8 bits"
    for plane in row.scales:
        columns = spec.get("group") if plane.columns == GROUP else plane.columns
        if columns != WHOLE and columns % spec.tier.lanes:
            return f"cannot read {row.name}: {columns} columns of a scale are no whole vectors"
        if plane.rows & (plane.rows - 1):
            return f"cannot read {row.name}: scales of {plane.rows} rows, no power of two"
        if any(plane.in_memory(dtype) not in ("F32", "BF16") for dtype in plane.dtypes):
            return f"cannot read {row.name}: its scales are neither F32 nor BF16 in memory"
    return ""
