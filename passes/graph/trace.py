"""A model on the meta device -> a torch.fx graph whose nodes are blocks, each with its `NodeMeta`.

Hides how torch.fx names and scopes nodes. Names come from the place in the model
("layers_3_mlp_experts"), so that they are the same in every run and can be told apart in a dump.
"""

from __future__ import annotations

import operator
import re
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.fx.node import Argument, Target

from hmc import env
from hmc.blocks import Block, silu_mul
from hmc.errors import CompileError
from hmc.graph import DType, NodeMeta, attrs, meta
from hmc.graph.printer import graph_text

_LAYER = re.compile(r"\blayers\.(\d+)\b")
_FUNCTIONS: dict[Any, tuple[str, DType]] = {
    operator.add: ("add", "f32"),
    silu_mul: ("silu_mul", "bf16"),
}
"""The functions a model file may use besides blocks: kind and result of each; the width is the
first input's.
"""

_MATMULS = frozenset(("linear", "experts", "gate_up"))
"""Kinds that read their activations in bf16."""


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace `model(ids, positions) -> logits`; every node of the result carries `NodeMeta`.

    The graph module shares the model's blocks and runs as the model does. The text of the graph
    goes to `HMC_DUMP/00-trace.txt`. Raises `CompileError` when the model does anything but call
    blocks, `+` and `silu_mul`.
    """
    tracer = _Tracer()
    graph = tracer.trace(model)
    for node in graph.nodes:
        node.meta["hmc"] = _node_meta(model, node, tracer.paths[node])
    for node in graph.nodes:
        node.meta["hmc"] = _with_readers(node)
    env.dump("00-trace.txt", graph_text(graph))
    return fx.GraphModule(model, graph)


class _Tracer(fx.Tracer):
    """Keeps blocks whole, names nodes by where they stand, and remembers that place in `paths`."""

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(silu_mul,))
        self.paths: dict[fx.Node, str] = {}

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Block)

    def create_node(
        self,
        kind: str,
        target: Target,
        args: tuple[Argument, ...],
        kwargs: dict[str, Argument],
        name: str | None = None,
        type_expr: Any | None = None,
    ) -> fx.Node:
        path = self.scope.module_path
        if kind == "call_function":
            known = _FUNCTIONS.get(target)
            path = f"{path}.{known[0]}" if known else path
        if kind in ("call_module", "call_function"):
            name = path.removeprefix("model.").replace(".", "_")
        node = super().create_node(kind, target, args, kwargs, name, type_expr)
        self.paths[node] = path
        return node


def _node_meta(model: nn.Module, node: fx.Node, path: str) -> NodeMeta:
    """What a node is, apart from what depends on its readers."""
    found = _LAYER.search(path)
    layer = int(found[1]) if found else -1
    if node.op == "placeholder":
        return NodeMeta("input", -1, 1, "i32")
    if node.op == "output":
        return NodeMeta("output", -1, _width(node), "f32")
    if node.op == "call_module":
        block = model.get_submodule(str(node.target))
        assert isinstance(block, Block)
        return NodeMeta(
            block.kind,
            layer,
            block.width,
            block.dtype,
            weights=block.weights(str(node.target)),
            attrs=block.attributes(),
        )
    if node.target in _FUNCTIONS:
        kind, dtype = _FUNCTIONS[node.target]
        extra = attrs(act="silu") if node.target is silu_mul else ()
        return NodeMeta(kind, layer, _width(node), dtype, attrs=extra)
    raise CompileError(
        f"cannot trace {node.format_node()} in {path or 'the model'}:"
        " a model file may call blocks, + and silu_mul"
    )


def _with_readers(node: fx.Node) -> NodeMeta:
    """Complete a node's meta by who reads it: the format of a norm, and which linears are router
    gates.
    """
    about = meta(node)
    readers = {meta(user).kind for user in node.users}
    if about.kind == "norm" and readers <= _MATMULS:
        return about.with_(dtype="bf16")
    if about.kind == "linear" and "route" in readers:
        # a router's gate is small and decides which experts run: checkpoints keep it unquantised
        plain = tuple(replace(weight, linear=False) for weight in about.weights)
        return about.with_(attrs=attrs(**dict(about.attrs), router=1), weights=plain)
    return about


def _width(node: fx.Node) -> int:
    """Width of a node's first input, traced before it."""
    return meta(node.all_input_nodes[0]).width
