"""Decides for every node in which stored format its weights are read and which kernels compute it
in each phase.

Contract
    * requires "fused"; establishes "kernels"
    * intact weights: the format is the checkpoint's own, nothing is converted, so no choice here
      changes numerics
    * every kernel can be built, or compiling ends here
    * every weight a node names is found in the checkpoint, with the shape the model gives it
    * the reason says why a weight is, or is not, in a low-bit format; equal decisions are reported
      once, with a count
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.checkpoint import WeightSource
from hmc.codegen.checks import check_spec
from hmc.codegen.spec import MAX_TOKENS, KernelSpec
from hmc.errors import PassFailedError, UnsupportedError
from hmc.graph import WeightSpec, meta
from hmc.ops import OPS, Stored, Use
from hmc.passes.context import Context, ranges
from hmc.plan.phases import DECODE, PREFILL

TOKENS = {PREFILL: 0, DECODE: MAX_TOKENS}
"""Tokens a call that kernels of each base phase take: any number, or few."""


@dataclass(frozen=True)
class Fp8Lowering:
    """Fills `formats` and `kernels` of every node."""

    name: ClassVar[str] = "fp8_lowering"
    requires: ClassVar[frozenset[str]] = frozenset({"fused"})
    establishes: ClassVar[frozenset[str]] = frozenset({"kernels"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for node in graph.graph.nodes:
            found = meta(node)
            row = OPS.get(found.kind)
            if row is None:
                continue
            sources = {weight.role: context.source(weight)[0] for weight in found.weights}
            stored = {role: _stored(source) for role, source in sources.items()}
            kernels = []
            for phase, tokens in TOKENS.items():
                use = Use(context.isa, tokens, context.options.kv_block)
                for spec in row.kernels(dict(found.attrs), stored, use):
                    check_spec(spec)
                    key = kernel_key(spec, out="out" in row.attrs)
                    context.kernels[key] = spec
                    kernels.append((phase, key))
            if not kernels:
                raise PassFailedError(f"no kernel computes a {found.kind} node ({node.name})")
            formats = {role: source.format for role, source in sources.items()}
            node.meta["hmc"] = found.with_(
                formats=tuple(sorted(formats.items())), kernels=tuple(kernels)
            )
            for weight in found.weights:
                names = ", ".join(key.split("-")[0] for phase, key in kernels if phase == DECODE)
                note = sources[weight.role].note
                groups[_family_of(weight), formats[weight.role], f"{note}; decode: {names}"].append(
                    found.layer
                )
        for (subject, form, reason), layers in groups.items():
            where = "" if layers == [-1] else f" of layers {ranges(layers)}"
            context.decide(self.name, subject + where, form, reason)


def _family_of(weight: WeightSpec) -> str:
    """A weight's name without layer numbers, so that equal decisions of many layers are one."""
    return re.sub(r"\.\d+\.", ".*.", weight.name)


def _stored(source: WeightSource) -> Stored:
    """What kernels must know of how a weight is stored."""
    if source.format != "int4":
        return Stored(source.format)
    bits = {"F32": 32, "BF16": 16}.get(source.scale_dtype)
    if bits is None:
        raise UnsupportedError(f"int4 scales in {source.scale_dtype}: kernels read BF16 and F32")
    return Stored(source.format, source.block, bits)


def kernel_key(spec: KernelSpec, *, out: bool = False) -> str:
    """A readable name, unique within a plan (one tier): op, format and sizes, e.g.
    `linear-fp8-k2048-tokens16`; with the result's dtype where the op has more than one (`out`).
    """
    sizes = [f"{name}{value}" for name, value in spec.params]
    return "-".join(filter(None, [spec.op, spec.weight, spec.out if out else "", *sizes]))
