"""Decides where every routed expert lives: on the host, sliced by NUMA node, where no GPU takes
part.

Contract
    * requires "kernels"; establishes "placed"
    * every expert of every layer is in exactly one tier
    * a host expert's output rows are cut into one slice a NUMA node, so that workers read their own
      node's memory
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch.fx

from hmc.graph import meta
from hmc.passes.context import Context, ranges
from hmc.plan import LayerPlacement


@dataclass(frozen=True)
class ExpertPlacement:
    """Fills `context.placement` and the device of every node."""

    name: ClassVar[str] = "expert_placement"
    requires: ClassVar[frozenset[str]] = frozenset({"kernels"})
    establishes: ClassVar[frozenset[str]] = frozenset({"placed"})

    def run(self, graph: torch.fx.GraphModule, context: Context) -> None:
        nodes = len(context.machine.nodes)
        placement = []
        for node in graph.graph.nodes:
            found = meta(node)
            node.meta["hmc"] = found.with_(device="host", stream="cpu")
            if found.kind == "experts":
                everyone = ranges(range(found.attr("experts")))
                placement.append(
                    LayerPlacement(layer=found.layer, tiers={"host": everyone}, node_slices=nodes)
                )
        context.placement = tuple(placement)
        if placement:
            where = "one NUMA node" if nodes == 1 else f"{nodes} NUMA nodes, rows sliced by node"
            gpus = len(context.machine.gpus)
            why = (
                f"machine {context.machine.name} has no GPU"
                if not gpus
                else f"this hmc computes experts on the CPU: the machine's {gpus} GPU(s) are unused"
            )
            context.decide(
                self.name,
                f"experts of layers {ranges(each.layer for each in placement)}",
                f"all on host, {where}",
                why,
            )
