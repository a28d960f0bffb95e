"""In which arithmetic a tier multiplies a weight format, and which formats have native decoders.

A format takes the best arithmetic that the tier has, in which its products are exact (the format's
row says so) and for which there is a decoder of codes like its own: that is told by what the row
says of them (bits, values, planes), not by its name. Where there is none, it is multiplied as f32
by the decoder that is made from its planes (formats/made.py): any table of codes of 2, 4 or 8 bits
or any plain float, less zeros and times scales of any blocks; and blocks of GGUF.

    arithmetic   tiers                codes                       decoded by
    bf16         those with pairs     any of 4 or 8 bits; BF16    tables in registers
    whole        the others           whole of 4 or 8 bits; E2M1  16-bit whole numbers
    f32          all                  E4M3; BF16, F16 and F32     shifts in place, or as they are
    f32, made    all                  all                         vectors, or a look-up a code

Blocks of GGUF are multiplied as bf16 or as whole numbers by decoders of their own; of few tokens as
whole numbers on every tier (`of_few`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from hmc.codegen.isa import TIERS
from hmc.codegen.spec import KernelSpec
from hmc.formats import GROUP, Format, format_of
from hmc.formats.base import Arithmetic

_CODES = (2, 4, 8)

NUMBERS = frozenset({"F32", "F16", "BF16", "F8_E8M0", "F8_E4M3", "F8_E5M2"})
"""Dtypes of scales and zeros that kernels read."""

GRAINS = (16, 32, 64)
"""Columns of an element that native decoders know, besides whole multiples of `GRAIN`."""
GRAIN = 128

_PLAIN = {"bf16": ("BF16",), "f32": ("BF16", "F16", "F32")}
"""Dtypes of codes that are floats, by the arithmetic that has decoders of them."""


SIGNED = tuple(float(code - 256 * (code > 127)) for code in range(256))
"""Values of a byte in two's complement."""

_UNCHECKED: frozenset[Arithmetic] = frozenset({"f32"})
"""Arithmetics whose decoder of E4M3 takes NaN codes for numbers."""


def is_line(values: Sequence[float]) -> bool:
    """Whether the values of codes are whole numbers from the first one up."""
    return bool(values) and all(value == values[0] + code for code, value in enumerate(values))


def is_whole(row: Format) -> bool:
    """Whether the codes of a row are whole numbers in a line, two's complement, or of 4 bits and
    whole when doubled.
    """
    if is_line(row.values):
        return row.code_bits in (4, 8)
    if row.code_bits == 8:
        return row.values == SIGNED
    small = all(abs(value) < 64 and 2 * value % 1 == 0 for value in row.values)
    return row.code_bits == 4 and small


def is_e4m3(row: Format) -> bool:
    """Whether the codes of a row are FP8 E4M3."""
    return row.codes.dtypes == ("F8_E4M3",)


_TABLES: Mapping[Arithmetic, Callable[[Format], bool]] = {
    "bf16": lambda row: row.code_bits in (4, 8),
    "whole": is_whole,
    "f32": is_e4m3,
}
"""Codes that a table says the values of: which there are decoders of, by arithmetic."""


def _decodes(row: Format, kind: Arithmetic) -> bool:
    """Whether there is a decoder in arithmetic `kind` of codes as the row's are."""
    if row.codes.block[1]:
        return False
    if not row.values:
        return not row.scales and row.codes.dtypes[0] in _PLAIN.get(kind, ())
    return kind in _TABLES and _TABLES[kind](row)


_OF_BLOCKS: frozenset[Arithmetic] = frozenset({"bf16", "whole"})


def _blocks(row: Format, kind: Arithmetic) -> bool:
    """Whether rows of blocks are multiplied in arithmetic `kind` (formats/block_dot.py,
    block_micro.py); else a decoder is made of them.
    """
    return kind in _OF_BLOCKS and row.codes.block[1] > 0


def arithmetic(isa: str, weight: str) -> Arithmetic:
    """How tier `isa` multiplies weights of a format by activations of many tokens."""
    row = format_of(weight)
    best: Arithmetic = "bf16" if TIERS[isa].pair_dot else "whole"
    return best if best in row.exact_in and (_decodes(row, best) or _blocks(row, best)) else "f32"


def of_few(isa: str, weight: str) -> Arithmetic:
    """How the tier multiplies weights of a format by up to 16 tokens.

    Codes of blocks are whole numbers as they lie or after one instruction, pairs of bf16 after
    several; in panels the codes of many tokens' products are converted once.
    """
    return "whole" if _blocks(format_of(weight), "whole") else arithmetic(isa, weight)


def in_bytes(isa: str, weight: str) -> bool:
    """Whether codes of few tokens' products are multiplied as bytes: those of less than one."""
    columns, size = format_of(weight).codes.block
    return TIERS[isa].whole_dot and size < columns


def has_native(isa: str, weight: str) -> bool:
    """Whether the tier has a decoder of such codes."""
    row, kind = format_of(weight), arithmetic(isa, weight)
    return _decodes(row, kind) or _blocks(row, kind)


def is_native(spec: KernelSpec) -> bool:
    """Whether the weights of `spec` are read by a native decoder of planes: one of such codes,
    whose scales lie as it knows them.
    """
    if format_of(spec.weight).codes.block[1] or not has_native(spec.isa, spec.weight):
        return False
    for plane in format_of(spec.weight).scales:
        columns = spec.get("group") if plane.columns == GROUP else plane.columns
        if plane.kind != "order" and columns % GRAIN and columns not in GRAINS:
            return False
    return True


def reads_blocks(spec: KernelSpec) -> bool:
    """Whether the weights of `spec` are read by a native decoder of blocks."""
    return _blocks(format_of(spec.weight), arithmetic(spec.isa, spec.weight))


def takes_nan(isa: str, weight: str) -> bool:
    """Whether the kernels of a format take NaN codes for numbers on tier `isa` (formats/unpack.py),
    so that weights must be checked for them; all others give NaN.
    """
    return (
        is_e4m3(format_of(weight))
        and arithmetic(isa, weight) in _UNCHECKED
        and has_native(isa, weight)
    )


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
