"""A model on the meta device -> a torch.fx graph whose nodes are blocks, each with its `NodeMeta`.

Hides how torch.fx names and scopes nodes. Names come from the place in the model
("layers_3_mlp_experts"), so that they are the same in every run and can be told apart in a dump.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from torch import fx, nn
from torch.fx.node import Argument, Target

from hmc import env
from hmc.blocks import Block, place_of, silu_mul
from hmc.errors import CompileError
from hmc.graph import DType, NodeMeta, Section, attrs, meta
from hmc.graph.printer import graph_text
from hmc.ops import OPS, Op

_FUNCTIONS: dict[Any, tuple[str, DType]] = {
    operator.add: ("add", "f32"),
    silu_mul: ("silu_mul", "bf16"),
}
"""The functions a model file may use besides blocks: kind and result of each; the width is the
first input's.
"""


def trace(model: nn.Module) -> fx.GraphModule:
    """Trace `model(ids, positions) -> logits`; every node of the result carries `NodeMeta`.

    The graph module shares the model's blocks and runs as the model does. The text of the graph
    goes to `HMC_DUMP/00-trace.txt`. Raises `CompileError` when the model does anything but call
    blocks, `+` and `silu_mul`.
    """
    tracer = _Tracer()
    graph = tracer.trace(model)
    for node in graph.nodes:
        node.meta["hmc"] = _node_meta(model, node, *tracer.places[node])
    for node in graph.nodes:
        node.meta["hmc"] = _with_readers(node)
    env.dump("00-trace.txt", graph_text(graph))
    return fx.GraphModule(model, graph)


class _Tracer(fx.Tracer):
    """Keeps blocks whole, names nodes by where they stand, and remembers in `places` the path and
    what the module around said of its place.
    """

    def __init__(self) -> None:
        super().__init__(autowrap_functions=(silu_mul,))
        self.places: dict[fx.Node, tuple[str, tuple[int, Section]]] = {}
        self._inside: list[nn.Module] = []

    def call_module(
        self,
        m: nn.Module,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
    ) -> Any:
        self._inside.append(m)
        try:
            return super().call_module(m, forward, args, kwargs)
        finally:
            self._inside.pop()

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
        inside = self._inside[-1] if self._inside else self.root
        self.places[node] = path, place_of(inside)
        return node


def _node_meta(model: nn.Module, node: fx.Node, path: str, place: tuple[int, Section]) -> NodeMeta:
    """What a node is, apart from what depends on its readers."""
    layer, section = place
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
            section,
            weights=block.weights(str(node.target)),
            attrs=block.attributes(),
        )
    if node.target in _FUNCTIONS:
        kind, dtype = _FUNCTIONS[node.target]
        width = _width(node)
        extra = attrs(act="silu") if node.target is silu_mul else attrs(width=width)
        return NodeMeta(kind, layer, width, dtype, section, attrs=extra)
    raise CompileError(
        f"cannot trace {node.format_node()} in {path or 'the model'}:"
        " a model file may call blocks, + and silu_mul"
    )


def _with_readers(node: fx.Node) -> NodeMeta:
    """Complete a node's meta by who reads it: the format of a norm, and which linears are router
    gates.
    """
    about = meta(node)
    readers = [OPS[meta(user).kind] for user in node.users if meta(user).kind in OPS]
    row = OPS.get(about.kind)
    if row is None or not readers:
        return about
    if "out" in row.attrs and all(_reads_bf16(reader) for reader in readers):
        return about.with_(dtype="bf16", attrs=attrs(**dict(about.attrs) | {"out": "bf16"}))
    if "router" in row.extra and any(reader.everywhere for reader in readers):
        # a router's gate is small and decides which experts run: checkpoints keep it unquantised
        plain = tuple(replace(weight, linear=False) for weight in about.weights)
        return about.with_(attrs=attrs(**dict(about.attrs), router=1), weights=plain)
    return about


def _reads_bf16(row: Op) -> bool:
    """Whether an op reads its activations in bf16: the matmuls do."""
    return row.inputs[0].dtype == "bf16"


def _width(node: fx.Node) -> int:
    """Width of a node's first input, traced before it."""
    return meta(node.all_input_nodes[0]).width
