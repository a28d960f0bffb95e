"""What placement asks of the graph's nodes, answered by the rows of their ops."""

from __future__ import annotations

import torch.fx

from hmc.graph import NodeMeta, meta
from hmc.ops import OPS


def routed_nodes(graph: torch.fx.GraphModule) -> list[NodeMeta]:
    """Nodes whose weights are one an expert, in order."""
    found = [meta(node) for node in graph.graph.nodes]
    return [each for each in found if each.kind in OPS and OPS[each.kind].routed]


def hosted_nodes(graph: torch.fx.GraphModule) -> list[NodeMeta]:
    """Nodes that stay with the host's memory: the embedding."""
    found = [meta(node) for node in graph.graph.nodes]
    return [each for each in found if each.kind in OPS and OPS[each.kind].where == "host"]


def leaves_host(node: NodeMeta) -> bool:
    """Whether a node goes to a GPU as a whole, where there is one."""
    row = OPS.get(node.kind)
    return row is None or not (row.routed or row.where == "host")
