"""Graphs as text, one line a node: for dumps, `hmc show --graph` and golden tests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hmc.graph.node import Attr, NodeMeta, WeightSpec, meta
from hmc.ops import OPS

if TYPE_CHECKING:
    from torch.fx import Graph


def graph_text(graph: Graph) -> str:
    """Every node in order: `name: kind @layer dtype[width] (inputs) {attributes} weights formats
    kernels`.

    Parts a node lacks are left out. The text holds nothing that varies from run to run.
    """
    return "".join(f"{_line(node, meta(node))}\n" for node in graph.nodes)


def _line(node: Any, about: NodeMeta) -> str:
    layer = f" @{about.layer}" if about.layer >= 0 else ""
    parts = [f"{node.name}: {about.kind}{layer} {about.dtype}[{about.width}]"]
    if node.all_input_nodes:
        parts.append(f"({', '.join(source.name for source in node.all_input_nodes)})")
    if about.attrs:
        parts.append("{" + " ".join(f"{key}={_value(value)}" for key, value in about.attrs) + "}")
    formats = dict(about.formats)
    parts += [_weight(weight, formats.get(weight.role, "")) for weight in about.weights]
    parts += [f"{phase}->{OPS[about.kind].key(spec)}" for phase, spec in about.kernels]
    return " ".join(parts)


def _weight(weight: WeightSpec, chosen: str) -> str:
    shape = "x".join(map(str, weight.shape))
    count = f"{weight.experts} of " if weight.experts else ""
    return f"{weight.role}={weight.name}[{count}{shape}{' ' + chosen if chosen else ''}]"


def _value(value: Attr) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} from {value[0]:.6g} to {value[-1]:.6g}"
    return f"{value:.9g}" if isinstance(value, float) else str(value)
