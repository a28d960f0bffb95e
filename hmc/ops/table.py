"""All rows by name: `OPS`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from hmc.errors import VerifyError
from hmc.ops import (
    attention,
    block_sparse,
    compressed,
    hyper,
    matmul,
    moves,
    norms,
    pointwise,
    pools,
    recurrent,
    routing,
    sparse,
)
from hmc.ops.row import Op

_FAMILIES = (
    norms,
    pointwise,
    hyper,
    matmul,
    attention,
    sparse,
    block_sparse,
    compressed,
    pools,
    recurrent,
    routing,
    moves,
)

OPS: Final[dict[str, Op]] = {op.name: op for family in _FAMILIES for op in family.OPS}
"""Every op of graphs and plans. Tests add rows of their own."""

SHARED_ATTRS: Final[Mapping[str, type]] = {"ranks": int, "whole": int}
"""Attributes that a schedule may give any step: it works on 1/`ranks` of a call's tokens; on all of
them in a phase of several lanes."""


def op_of(name: str) -> Op:
    """The row of an op; `VerifyError` for a name that has none."""
    found = OPS.get(name)
    if found is None:
        raise VerifyError(f"unknown op {name}: known are {', '.join(sorted(OPS))}")
    return found
