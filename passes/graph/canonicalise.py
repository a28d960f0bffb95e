"""One form for what models write differently: no dead nodes, and per-head norms inside the rotary
that reads them.

Contract
    * requires a traced graph; establishes "canonical"
    * a norm with one group a head whose only reader is a rotary of the same heads becomes part of
      it, since both walk a head at a time and the result is rotated in place
    * values are unchanged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.blocks import RMSNorm, Rotary
from hmc.graph import meta
from hmc.passes.records import Notes, Target, replace_with_module, submodule
from hmc.plan import Decision
from hmc.ranges import ranges


@dataclass(frozen=True)
class Canonicalise:
    """Removes dead nodes and folds per-head norms into their rotary."""

    name: ClassVar[str] = "canonicalise"
    requires: ClassVar[frozenset[str]] = frozenset({"traced"})
    establishes: ClassVar[frozenset[str]] = frozenset({"canonical"})

    def run(self, graph: torch.fx.GraphModule, target: Target) -> Sequence[Decision]:
        graph.graph.eliminate_dead_code()
        folded = [
            meta(node).layer for node in list(graph.graph.nodes) if _fold_head_norm(graph, node)
        ]
        notes = Notes(self.name)
        if folded:
            notes.decide(
                f"per-head norms of layers {ranges(set(folded))}",
                "folded into rotary",
                f"{len(folded)} norms read by a rotary of the same heads alone:"
                " one walk over q and k, not two",
            )
        return notes.made


def _fold_head_norm(graph: torch.fx.GraphModule, node: torch.fx.Node) -> bool:
    turning = submodule(graph, node)
    if not isinstance(turning, Rotary):
        return False
    source, positions = node.args
    assert isinstance(source, torch.fx.Node) and isinstance(positions, torch.fx.Node)
    norm, rotary = submodule(graph, source), meta(node)
    if not isinstance(norm, RMSNorm) or len(source.users) != 1 or norm.groups != turning.heads:
        return False
    fused = turning.with_norm(norm)
    inputs = (source.args[0], positions)
    replace_with_module(
        graph,
        node,
        f"{node.name}_normed",
        fused,
        inputs,  # type: ignore[arg-type]
        rotary.with_(weights=meta(source).weights, attrs=fused.attributes()),
    )
    graph.graph.erase_node(node)
    graph.graph.erase_node(source)
    return True
