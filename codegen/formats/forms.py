"""Which dot product a spec's rows take, and which micro-kernel: chosen once, by format and tier."""

from __future__ import annotations

from hmc.codegen.formats.block_dot import BlockDot, ByteBlockDot
from hmc.codegen.formats.block_micro import BlockPairs, BlockWords
from hmc.codegen.formats.dot import Dot
from hmc.codegen.formats.micro import (
    Floats,
    Fp8InPlace,
    Fp8Sums,
    MicroKernel,
    Pairs,
    WholeNumbers,
)
from hmc.codegen.formats.planes import planes_of
from hmc.codegen.formats.whole import WholeDot
from hmc.codegen.native import GRAIN as CHUNK
from hmc.codegen.native import arithmetic, in_bytes, is_e4m3, is_native, of_few, reads_blocks
from hmc.codegen.spec import KernelSpec
from hmc.formats import format_of


def dot_of(spec: KernelSpec, k: int) -> Dot:
    """The form for rows of `k` weights as `spec` stores them, on its tier."""
    if reads_blocks(spec):
        return (ByteBlockDot if in_bytes(spec.isa, spec.weight) else BlockDot)(spec, k)
    whole = of_few(spec.isa, spec.weight) == "whole"
    return (WholeDot if whole and is_native(spec) else Dot)(spec, k)


def micro_of(spec: KernelSpec) -> MicroKernel:
    """The micro-kernel for the format and the tier of `spec`."""
    kind = arithmetic(spec.isa, spec.weight)
    if reads_blocks(spec):
        return {"bf16": BlockPairs, "whole": BlockWords}[kind](spec)
    if not is_native(spec):
        return Floats(spec)
    if kind != "f32":
        return {"bf16": Pairs, "whole": WholeNumbers}[kind](spec)
    if not is_e4m3(format_of(spec.weight)):
        return Floats(spec)
    one = all(plane.columns >= CHUNK for plane in planes_of(spec))
    return (Fp8InPlace if one else Fp8Sums)(spec)
