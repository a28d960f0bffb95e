"""One form for what models write differently: no dead nodes, and per-head norms inside the rotary
that reads them.

Contract
    * a norm with one group a head whose only reader is a rotary of the same heads becomes part of
      it, since both walk a head at a time, where nothing else reads what is then rotated in place
    * values are unchanged
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.blocks import RMSNorm, Rotary
from hmc.graph import meta
from hmc.passes.records import Notes, Target, put_block, submodule
from hmc.plan import Decision
from hmc.ranges import ranges


@dataclass(frozen=True)
class Canonicalise:
    """Removes dead nodes and folds per-head norms into their rotary."""

    name: ClassVar[str] = "canonicalise"

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
    norm = submodule(graph, source)
    if not isinstance(norm, RMSNorm) or len(source.users) != 1 or norm.groups != turning.heads:
        return False
    if len(source.all_input_nodes[0].users) != 1:  # keys that are values too
        return False
    inputs, weights = (source.args[0], positions), meta(source).weights + meta(node).weights
    name = f"{node.name}_normed"
    fused = put_block(graph, node, name, turning.with_norm(norm), inputs, meta(node), weights)
    node.replace_all_uses_with(fused)
    graph.graph.erase_node(node)
    graph.graph.erase_node(source)
    return True
