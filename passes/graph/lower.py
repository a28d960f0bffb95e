"""Decides for every node in which stored format its weights are read and which kernels compute it
in each phase.

Contract
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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.codegen.checks import check_spec
from hmc.codegen.spec import MAX_TOKENS
from hmc.errors import PassFailedError
from hmc.graph import WeightSpec, meta
from hmc.ops import OPS, Stored, Use
from hmc.passes.records import BLOCK, Notes, Target
from hmc.plan import Decision
from hmc.plan.phases import DECODE, PREFILL
from hmc.ranges import ranges

TOKENS = {PREFILL: 0, DECODE: MAX_TOKENS}
"""Tokens a call that kernels of each base phase take: any number, or few."""


@dataclass(frozen=True)
class Lower:
    """Fills `formats` and `kernels` of every node."""

    name: ClassVar[str] = "lower"

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        groups: dict[tuple[str, str, str], list[int]] = defaultdict(list)
        for node in graph.graph.nodes:
            found = meta(node)
            row = OPS.get(found.kind)
            if row is None:
                continue
            sources = {weight.role: target.source(weight)[0] for weight in found.weights}
            stored = {role: Stored.of(s.format, s.group, s.dtypes) for role, s in sources.items()}
            kernels = tuple(
                (phase, spec)
                for phase, tokens in TOKENS.items()
                for spec in row.kernels(dict(found.attrs), stored, Use(target.isa, tokens, BLOCK))
            )
            for _, spec in kernels:
                check_spec(spec)
            if not kernels:
                raise PassFailedError(f"no kernel computes a {found.kind} node ({node.name})")
            formats = {role: source.format for role, source in sources.items()}
            node.meta["hmc"] = found.with_(formats=tuple(sorted(formats.items())), kernels=kernels)
            names = ", ".join(spec.op for phase, spec in kernels if phase == DECODE)
            for weight in found.weights:
                reason = f"{sources[weight.role].note}; decode: {names}"
                groups[_family_of(weight), formats[weight.role], reason].append(found.layer)
        notes = Notes(self.name)
        for (subject, form, reason), layers in groups.items():
            where = "" if layers == [-1] else f" of layers {ranges(layers)}"
            notes.decide(subject + where, form, reason)
        return notes.made


def _family_of(weight: WeightSpec) -> str:
    """A weight's name without layer numbers, so that equal decisions of many layers are one."""
    return re.sub(r"\.\d+\.", ".*.", weight.name)
