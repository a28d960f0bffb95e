"""What hmc knows of a traced graph, and graphs as text."""

from hmc.graph.node import PLAIN, Attr, DType, NodeMeta, Section, WeightSpec, attrs, meta

__all__ = ["PLAIN", "Attr", "DType", "NodeMeta", "Section", "WeightSpec", "attrs", "meta"]
