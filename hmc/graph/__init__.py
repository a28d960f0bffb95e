"""What hmc knows of a traced graph, and graphs as text."""

from hmc.graph.node import KINDS, Attr, DType, NodeMeta, WeightSpec, attrs, meta

__all__ = ["KINDS", "Attr", "DType", "NodeMeta", "WeightSpec", "attrs", "meta"]
