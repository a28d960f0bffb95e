"""A matmul that only chooses, screened: what is compact beside the stored matrix, which kernels
read it, and how many bytes that is.

For a row w of the matrix, c of the compact copy and activations x,

    |fl(w . x) - fl(c . x)|  <=  |(w - c) . x| + roundings  <=  norm(w) |x|

where norm(w) = |w - c| and a share of |w| + |c| for the roundings of both sums
(codegen/kernels/matmul/screen.py derives it). So every row has a lower and an upper bound on what
the stored matrix gives, and rows whose upper bound is below the k-th best lower bound are not among
the k best: the others are computed from the stored matrix, by its own kernel's arithmetic.
"""

from __future__ import annotations

from typing import Final

from hmc.codegen.spec import KernelSpec
from hmc.errors import UnsupportedError
from hmc.formats import format_of
from hmc.ops.row import Attrs, Stored, Use, Weights, picked, spec

GROUP: Final = 32
"""Columns of a scale of the compact copy."""
_COMPACT: Final = Stored.of("int8-group", GROUP, ("I8", "BF16"))
COMPACT: Final = _COMPACT.format
"""The format of the compact copy."""
MOST_BEST: Final = 256
"""Most rows that anybody may ask to be the best ones: more are found by reading all."""
_LEAST_GAIN: Final = 4 << 20
"""Bytes that must be saved for the passes over bounds to pay."""
_LONGEST: Final = 1 << 16
"""Most columns of which the sums of squares are within their bound."""


def compact_bytes(rows: int, k: int) -> int:
    """Bytes of codes, scales and norms beside a matrix [rows, k]: what a step reads of it."""
    return rows * (format_of(COMPACT).row_bytes(k) + 2 * (k // GROUP) + 4)


def unscreened(form: str, k: int) -> str:
    """Why a matrix of `k` columns in a format cannot be screened; "" where it can."""
    row = format_of(form)
    if row.values or row.codes.block[1] or row.scales:
        return f"it is stored in {row.title}: no compact copy is made of codes"
    if k % GROUP or k > _LONGEST:
        return f"its {k} columns are no whole groups of {GROUP}, {_LONGEST} at most"
    return ""


def gain_bytes(rows: int, k: int, stored: int) -> int:
    """Bytes that a step reads less; 0 where these are too few to pay."""
    gain = stored - compact_bytes(rows, k)
    return gain if gain >= _LEAST_GAIN else 0


def screen_kernels(attrs: Attrs, weights: Weights, use: Use) -> tuple[KernelSpec, ...]:
    """In launch order: the matrix itself where all is wanted; else the compact copy, the best lower
    bounds, and the rows that may be among the best.
    """
    stored = weights["weight"]
    if why := unscreened(stored.format, int(attrs["k"])) or ("it has a bias" * (len(weights) > 1)):
        raise UnsupportedError(f"a matrix is screened, but {why}")
    k, tokens = picked(attrs, "k"), {"tokens": use.tokens}
    return (
        spec("linear", use, {**k, **stored.sizes, **tokens}, stored.format),
        spec("screen", use, {**k, **_COMPACT.sizes, **tokens}, COMPACT),
        spec("screen_tops", use, {**k, **tokens}),
        spec("screen_rows", use, {**k, **stored.sizes, **tokens}, stored.format),
    )


def copy_kernel(isa: str, form: str, k: int) -> KernelSpec:
    """What makes the compact copy of rows stored in a plain format."""
    return KernelSpec.of("screen_copy", isa, weight=form, k=k, group=GROUP)
