"""Decides for every node in which stored format its weights are read and which kernels compute it
in each phase.

Contract
    * requires "fused"; establishes "kernels"
    * intact weights: the format is the checkpoint's own, nothing is converted, so no choice here
      changes numerics
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

from hmc.codegen.spec import KernelSpec
from hmc.graph import WeightSpec, meta
from hmc.passes.context import Context, ranges
from hmc.passes.graph.kernel_choice import PHASES, Target, choose


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
            if found.kind in ("input", "output", "item"):
                continue
            sources = {weight.role: context.source(weight)[0] for weight in found.weights}
            formats = {role: source.format for role, source in sources.items()}
            target = Target(
                context.isa,
                context.options.kv_block,
                formats,
                {role: source.block for role, source in sources.items()},
                {role: source.scale_dtype for role, source in sources.items()},
            )
            kernels = []
            for phase in PHASES:
                for spec in choose(found, phase, target):
                    kernels.append((phase, _register(context, spec)))
            node.meta["hmc"] = found.with_(
                formats=tuple(sorted(formats.items())), kernels=tuple(kernels)
            )
            for weight in found.weights:
                names = ", ".join(key.split("-")[0] for phase, key in kernels if phase == "decode")
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


def _register(context: Context, spec: KernelSpec | str) -> str:
    if isinstance(spec, str):
        return spec
    key = kernel_key(spec)
    context.kernels[key] = spec
    return key


def kernel_key(spec: KernelSpec) -> str:
    """A readable name, unique within a plan (one tier): op, format and sizes, e.g.
    `linear-fp8-k2048-tokens16`.
    """
    sizes = [f"{name}{value}" for name, value in spec.params]
    out = [spec.out] if spec.op == "norm" else []
    return "-".join(filter(None, [spec.op, spec.weight, *out, *sizes]))
