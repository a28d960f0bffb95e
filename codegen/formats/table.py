"""Which form of the dot product a kernel takes (dot.py tells why there are several)."""

from __future__ import annotations

from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.whole import WholeDot
from hmc.codegen.native import arithmetic
from hmc.codegen.spec import KernelSpec


def dot_of(spec: KernelSpec, k: int) -> Dot:
    """The form for rows of `k` weights as `spec` stores them, on its tier."""
    return (WholeDot if arithmetic(spec.isa, spec.weight) == "whole" else Dot)(spec, k)
